# %% [markdown]
"""# Swap a part: the same run with another attention

Does a small model that trains for two minutes need to look further back than 32 tokens? Two
variants, equal seeds, equal text in equal order, and a difference with its interval.
"""

# %%
from configs import quickstart
from deepseek_jax import lab

# %% [markdown]
"""Three seeds of sixty steps, twice: some ten minutes on two CPU cores. Seeds of one variant share
one compiled step."""

# %% tags=["parameters"]
BASE = quickstart.get_config()
STEPS, SEEDS = 60, 3

# %% [markdown]
"""One line changes the part. What is different is printed, and whether the size changed: here heads
and latents carry over, so both variants have the same weights.
"""

# %%
window = lab.override(BASE, {'model.attention': 'Window(size=32, sinks=2)'})

# %%
trials = {
  'MLA': lab.train(BASE, steps=STEPS, seeds=SEEDS),
  'Window': lab.train(window, steps=STEPS, seeds=SEEDS),
}
lab.plot_curves(trials)

# %% [markdown]
"""The difference is taken seed by seed. One whose interval holds zero is none that so few seeds can
show, whichever sign it has; with one seed there is no interval.
"""

# %%
print(lab.compare(trials))

# %% [markdown]
"""The window can be seen: outside of it, and of the two sinks, nothing is looked at."""

# %%
TEXT = 'It is a truth universally acknowledged, that a single man in possession of a good fortune'
maps = lab.attention_maps(trials['Window'].model, TEXT)
maps.plot(layer=-1, heads=[0, 1])
