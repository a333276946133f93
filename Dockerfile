# Two images of one project: `control` (everything without a GPU) and `gpu` (the host worker beside vLLM).
#
#   docker build --target control -t vllm-recovery .
#   docker build --target gpu --build-arg VLLM_IMAGE=vllm/vllm-openai:v0.32.0 -t vllm-recovery-gpu .

ARG PYTHON_IMAGE=python:3.12-slim
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE CHANGELOG.md beat_schedule.py ./
COPY recovery recovery
COPY workers workers
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE} AS control
COPY --from=wheel /dist /tmp/dist
RUN python -m venv /opt/recovery \
    && /opt/recovery/bin/pip install --no-cache-dir /tmp/dist/*.whl \
    && rm -rf /tmp/dist \
    && useradd --uid 10001 --user-group --home-dir /srv/recovery --no-create-home recovery \
    && install -d -o recovery -g recovery -m 0700 /srv/recovery
ENV PATH=/opt/recovery/bin:$PATH HOME=/srv/recovery RECOVERY_HOME=/srv/recovery PYTHONUNBUFFERED=1
USER recovery
WORKDIR /srv
CMD ["recovery", "--help"]

# An environment of its own beside vLLM's: neither changes a version of the other's packages. `vllm` is found on PATH.
FROM ${VLLM_IMAGE} AS gpu
USER root
COPY --from=wheel /dist /tmp/dist
RUN python3 -m venv --without-pip /opt/recovery \
    && python3 -m pip --python /opt/recovery/bin/python install --no-cache-dir "$(echo /tmp/dist/*.whl)[gpu]" \
    && rm -rf /tmp/dist \
    && useradd --uid 10001 --user-group --home-dir /srv/recovery --no-create-home recovery \
    && install -d -o recovery -g recovery -m 0700 /srv/recovery /srv/models
ENV PATH=/opt/recovery/bin:$PATH HOME=/srv/recovery RECOVERY_HOME=/srv/recovery HF_HOME=/srv/models PYTHONUNBUFFERED=1
USER recovery
WORKDIR /srv
ENTRYPOINT []
CMD ["recovery", "host", "--drain"]
