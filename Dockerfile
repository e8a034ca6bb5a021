# The project on CPU: `docker build -t deepseek_jax . && docker run -it deepseek_jax`
# The steps are those of scripts/setup.sh; nothing else installs anything.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 researcher
USER 1000:1000
RUN mkdir /home/researcher/deepseek_jax
WORKDIR /home/researcher/deepseek_jax
ENV PIP_NO_CACHE_DIR=1

# First what decides the environment, so that a change of the source rebuilds none of it. The editable
# install only points to this folder, and finds the source when it arrives.
COPY --chown=1000:1000 requirements.lock setup.py pyproject.toml LICENSE ./
COPY --chown=1000:1000 scripts/setup.sh scripts/
COPY --chown=1000:1000 deepseek_jax/__init__.py deepseek_jax/
RUN scripts/setup.sh

COPY --chown=1000:1000 . .
RUN scripts/setup.sh

CMD ["scripts/quickstart.sh"]
