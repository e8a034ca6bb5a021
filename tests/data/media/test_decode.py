"""Files that need a library: clips, meshes, and sounds other than WAV."""

import io

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.decode import EXTENSIONS, Sizes, decode, kind_of
from deepseek_jax.data.media.record import UnreadableError

SIZES = Sizes(side=16, frames=4, rate=8000, seconds=0.5, points=400, most_pixels=100_000)


def test_kinds():
  assert kind_of('a/b.PNG') == 'image'
  assert kind_of('b.tar.flac') == 'sound'
  assert kind_of('notes.md') is kind_of('png') is None
  endings = [ending for group in EXTENSIONS.values() for ending in group]
  assert len(set(endings)) == len(endings)


@pytest.mark.parametrize(
  ('kind', 'name', 'module'),
  [('video', 'a.mp4', 'av'), ('sound', 'a.mp3', 'soundfile'), ('points', 'a.ply', 'trimesh')],
)
def test_missing_libraries(monkeypatch, kind, name, module):
  """An error that says what to install, and not a file that is left out."""
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=rf"{module}: pip install 'deepseek_jax\[media\]'"):
    decode(kind, name, b'x', SIZES)


@pytest.mark.parametrize(('side', 'frames'), [(0, 4), (8, 0)])
def test_wrong_sizes(side, frames):
  with pytest.raises(ConfigError, match='is 0'):
    Sizes(side=side, frames=frames)


def clip(times=range(8), size=(32, 48), sound=False, form='mp4') -> bytes:
  """A clip that turns from black to white: its shade at time t of T is 255 · t / T."""
  import av

  stream, last = io.BytesIO(), max(times, default=1) or 1
  with av.open(stream, 'w', format=form) as container:
    if sound:
      track = container.add_stream('aac', rate=8000)
      frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
      frame.rate = 8000
      for packet in [*track.encode(frame), *track.encode(None)]:
        container.mux(packet)
      return finished(container, stream)
    track = container.add_stream('mpeg4', rate=10)
    track.height, track.width = size
    track.pix_fmt = 'yuv420p'
    for time in times:
      shade = round(255 * time / last)
      frame = av.VideoFrame.from_ndarray(np.full((*size, 3), shade, np.uint8), 'rgb24')
      frame.pts = time
      for packet in track.encode(frame):
        container.mux(packet)
    for packet in track.encode(None):
      container.mux(packet)
    return finished(container, stream)


def finished(container, stream) -> bytes:
  """The whole file."""
  container.close()
  return stream.getvalue()


def test_clips():
  """Evenly over time whatever the rate; white above and below what is wide."""
  pytest.importorskip('av')
  values = decode('video', 'a.mp4', clip(), SIZES)
  assert values.shape == (4, 16, 16, 3)
  middle = values[:, 8, 8, 0].astype(int)
  np.testing.assert_allclose(middle, [36, 109, 182, 255], atol=12)
  assert (values[:, 0] == 255).all()
  # Most frames in the first tenth of the time: by number they would all be dark.
  uneven = decode('video', 'a.mkv', clip((0, 1, 2, 3, 4, 5, 6, 30, 60), form='matroska'), SIZES)
  assert uneven[:, 8, 8, 0].astype(int)[-1] > 110
  few = decode('video', 'a.mp4', clip(range(2)), SIZES)
  assert 1 <= len(few) <= 2


def test_broken_clips():
  pytest.importorskip('av')
  whole = clip()
  noise = np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes()
  for name, data, reason in [
    (
      'cut.mp4',
      whole[: len(whole) // 2],
      'not a readable video|cannot be decoded|cut short|no video',
    ),
    ('text.mp4', b'words ' * 50, 'not a readable video'),
    ('noise.avi', noise, 'not a readable video|without frames|no video'),
    ('empty.mp4', b'', 'an empty file'),
    ('sound.mp4', clip(sound=True), 'no video in it'),
    ('none.mkv', clip((), form='matroska'), 'without frames|not a readable|no video'),
    ('large.mp4', clip(range(2), size=(400, 400)), '400 × 400 pixels'),
  ]:
    with pytest.raises(UnreadableError, match=reason):
      decode('video', name, data, SIZES)


def test_other_sounds():
  """The tone is where it was, and its depth."""
  soundfile = pytest.importorskip('soundfile')
  tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4800) / 16_000)

  def saved(form, subtype, wave=tone):
    stream = io.BytesIO()
    soundfile.write(stream, wave, 16_000, format=form, subtype=subtype)
    return stream.getvalue()

  good = [('FLAC', 'PCM_24'), ('OGG', 'VORBIS'), ('AIFF', 'PCM_16'), ('AU', 'ULAW'), ('MP3', None)]
  for form, subtype in good:
    found = decode('sound', f'a.{form.lower()}', saved(form, subtype), SIZES)
    spectrum = np.abs(np.fft.rfft(found[300:2300] * np.hanning(2000)))
    assert abs(4 * np.argmax(spectrum) - 440) <= 4
  stereo = decode('sound', 'a.flac', saved('FLAC', 'PCM_16', np.stack([tone] * 2, 1)), SIZES)
  assert np.abs(stereo[300:2000]).max() == pytest.approx(0.5, abs=0.03)
  whole = saved('FLAC', 'PCM_16', np.random.default_rng(0).uniform(-1, 1, 8000))
  for data, reason in [
    (saved('FLAC', 'PCM_16', np.zeros(4000)), 'silent'),
    (whole[:60], 'not a readable sound|too few'),
    (b'no sound at all', 'not a readable sound'),
  ]:
    with pytest.raises(UnreadableError, match=reason):
      decode('sound', 'a.flac', data, SIZES)


CUBE = """v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\nv 0 1 1
f 1 3 2\nf 1 4 3\nf 5 6 7\nf 5 7 8\nf 1 2 6\nf 1 6 5
f 3 4 8\nf 3 8 7\nf 2 3 7\nf 2 7 6\nf 1 5 8\nf 1 8 4\n"""
PLY = (
  'ply\nformat ascii 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n'
)


def ply(vertices, faces=()) -> bytes:
  """A PLY file of texts."""
  head = PLY.format(len(vertices))
  if faces:
    head += f'element face {len(faces)}\nproperty list uchar int vertex_indices\n'
  lines = [' '.join(map(str, v)) for v in vertices]
  lines += [f'{len(f)} {" ".join(map(str, f))}' for f in faces]
  return '\n'.join([head + 'end_header', *lines, '']).encode()


def test_meshes():
  """Evenly over the surface, the same points every time."""
  trimesh = pytest.importorskip('trimesh')
  cube = decode('points', 'a.obj', CUBE.encode(), SIZES)
  np.testing.assert_array_equal(cube, decode('points', 'b.obj', CUBE.encode(), SIZES))
  on_side = np.isclose(np.abs(cube[:, :3]), np.abs(cube[:, :3]).max(axis=0), atol=0.01)
  assert on_side.any(axis=1).all()
  assert (on_side.sum(axis=0) > 80).all()
  mesh = trimesh.creation.icosphere()
  mesh.visual.face_colors = [255, 0, 0, 255]
  for ending in ('ply', 'stl', 'off', 'glb'):
    data = mesh.export(file_type=ending)
    cloud = decode(
      'points', f'a.{ending}', data if isinstance(data, bytes) else data.encode(), SIZES
    )
    radii = np.linalg.norm(cloud[:, :3], axis=1)
    assert radii.max() == pytest.approx(1, abs=1e-6)
    assert radii.min() > 0.9
    assert cloud.shape == (400, 6)
  red = decode('points', 'a.ply', mesh.export(file_type='ply'), SIZES)
  assert (red[:, 3] > 0.99).all()
  assert (red[:, 4:] < 0.01).all()
  points = np.random.default_rng(0).random((30, 3)).tolist()
  assert decode('points', 'a.ply', ply(points), SIZES).shape == (400, 6)


def test_broken_meshes():
  pytest.importorskip('trimesh')
  square = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1)]
  for name, data, reason in [
    (
      'no_faces.obj',
      CUBE.split('f')[0].encode(),
      'without faces|no vertices|nothing in it|not a read',
    ),
    ('nan.ply', ply([*square, ('nan', 0, 0)], [(0, 1, 2)]), 'finite'),
    ('flat.ply', ply(square, [(0, 0, 1), (2, 2, 2)]), 'without a surface'),
    ('line.ply', ply([(0, 0, 0), (1, 1, 1), (2, 2, 2)], [(0, 1, 2)]), 'without a surface'),
    ('far.ply', ply(square, [(0, 1, 77)]), 'a face with vertex 77|not a readable'),
    ('one_place.ply', ply([(1, 1, 1)] * 9), 'all points are in one place'),
    ('none.ply', ply([]), 'no vertices|nothing in it|not a readable'),
    ('cut.ply', ply(square, [(0, 1, 2)])[:150], 'not a readable|without faces|no vertices|few'),
    ('text.glb', b'words', 'not a readable points'),
    ('text.stl', b'words', 'not a readable points|without|no vertices|nothing'),
    ('empty.off', b'', 'an empty file'),
  ]:
    with pytest.raises(UnreadableError, match=reason):
      decode('points', name, data, SIZES)
