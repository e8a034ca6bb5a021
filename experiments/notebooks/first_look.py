# %% [markdown]
"""# A first look: train a small DeepSeek-V3, and look inside

Latent attention, a mixture of experts, English text that is in the package. Some sixty steps teach
it little more than which words are frequent, and that is enough to see where everything is.
"""

# %%
from configs import quickstart
from deepseek_jax import lab

# %% [markdown]
"""What is trained, and for how long. Sixty steps of `quickstart` take some two minutes on two CPU
cores, after a minute of compilation; the very first run makes tokens of the text too."""

# %% tags=["parameters"]
BASE = quickstart.get_config()
STEPS = 60

# %% [markdown]
"""## Parameters

Layers are numbered as the model runs them, whatever loop the compiler makes of equal ones. In a
notebook this is a tree to unfold, printed it is a table.
"""

# %%
untrained = lab.init(BASE)
print(lab.parameters(untrained))

# %% [markdown]
"""## Some steps

A trial is a whole run: the learning rate rises and falls within it.
"""

# %%
trial = lab.train(BASE, steps=STEPS)
lab.plot_curves({'quickstart': trial})

# %% [markdown]
"""## Who looks at whom

One square a head: a row is the token that looks, a column the token that is looked at.
"""

# %%
TEXT = 'And the LORD said unto Moses, Go down to the people.'
maps = lab.attention_maps(trial.model, TEXT)
maps.plot(layer=-1)

# %% [markdown]
"""## What it would say after each layer

The stream after every layer, read by the final norm and the head. The top row is the model's own
prediction; `nats()` is what each row pays for the text that really follows.
"""

# %%
lens = lab.logit_lens(trial.model, TEXT)
print('nats a token, embedding first:', lens.nats().mean(axis=1).round(2))
lens.plot()

# %% [markdown]
"""## Which experts read which tokens

Held-out text, by class of token. `classify=` takes a function of your own.
"""

# %%
load = lab.expert_load(trial.model, lab.heldout(BASE))
load.plot()
