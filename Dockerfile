# Lathe on the CPU. Not built here: there was no Docker on the machine where this was written; `make lint` runs hadolint.
#
#   docker build --tag lathe .
#   docker run --rm --volume lathe:/home/lathe/lathe lathe                       # the whole pipeline
#   docker run --rm -it --volume lathe:/home/lathe/lathe lathe make chat         # with what the volume keeps
#
# On Linux the package index's torch takes gigabytes of CUDA packages along. With --build-arg PIP_FIND_LINKS=PLACE, a page
# or a folder of this checkout that holds the CPU build, it does not.
FROM python:3.11.11-slim-bookworm AS build
# Debian keeps the newest version of a package alone, so that a pinned one could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 lathe
USER 1000
WORKDIR /home/lathe/lathe
COPY --chown=1000:1000 . .
# Extras of pyproject.toml: "dev" adds the tests.
ARG EXTRAS="train judge search serve"
ARG PIP_FIND_LINKS
# llama.cpp for any processor with AVX2, not only for the one that builds the image. The cache is kept for the next build.
RUN --mount=type=cache,target=/home/lathe/.cache,uid=1000,gid=1000 \
    CMAKE_ARGS=-DGGML_NATIVE=OFF make setup EXTRAS="$EXTRAS"

FROM python:3.11.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libgomp1 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 lathe
USER 1000
WORKDIR /home/lathe/lathe
COPY --from=build --chown=1000:1000 /home/lathe/lathe .
ENV PATH=/home/lathe/lathe/.venv/bin:$PATH
CMD ["make", "repro"]
