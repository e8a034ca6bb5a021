"""Data of the runs in `configs/`, in sizes for two CPU cores; each is one `MediaCorpus`."""

from deepseek_jax.data.media.clip import Clips
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.drawings import Drawings
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Mixture, Share
from deepseek_jax.data.media.plan import Alone, Packed
from deepseek_jax.data.media.question import Questions
from deepseek_jax.data.media.rows import MediaCorpus, Slots
from deepseek_jax.data.media.scene import Scenes
from deepseek_jax.data.media.sound import Sounds

PICTURE_SLOTS = 16
"""Embeddings of a picture of 64 pixels a side, in patches of 8, four of which become one."""

VISUAL_QUESTIONS = MediaCorpus(
  source=Mixture(
    shares=(
      Share(source=Questions(made=Made(train=50_000, heldout=2000))),
      Share(source=Scenes(made=Made(train=50_000, heldout=500))),
    )
  ),
  slots=Slots(image=PICTURE_SLOTS),
  layout=Packed(image=4),
  length=160,
  batch_size=16,
)
"""Questions about pictures, as often pictures with captions; four a row.

Who does not look is right in 26 % of the questions. Captions teach a picture's words by the dozen,
an answer teaches one: by questions alone a small model has not begun to look in 300 steps.
"""

IMAGE_TEXT = MediaCorpus(
  source=Mixture(
    shares=(
      Share(source=Drawings()),
      Share(source=Scenes(made=Made(train=20_000, heldout=1000)), weight=2.0),
    )
  ),
  slots=Slots(image=PICTURE_SLOTS),
  layout=Alone(),
  length=80,
  batch_size=32,
)
"""Drawings and made scenes with captions, one a row; 1,000 held-out scenes to be told apart."""

FIVE_MODALITIES = MediaCorpus(
  source=Mixture(
    shares=(
      Share(source=Drawings()),
      Share(source=Clips()),
      Share(source=Sounds(rate=8000, seconds=1.6)),
      Share(source=Clouds(points=256)),
    )
  ),
  slots=Slots(image=PICTURE_SLOTS, video=16, sound=16, points=16),
  layout=Packed(image=3, video=3, sound=3, points=3),
  length=192,
  batch_size=16,
)
"""Drawings, clips of eight frames, sounds of 12,800 samples and clouds of 256 points, as many of
each, with captions; the fifth modality is text."""
