"""Package metadata. The folder ``kernels/`` installs as ``simsid.kernels``."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "simsid/__init__.py").read_text("utf-8"), re.M).group(1)

CODECS = ["pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.0", "pyjpegls>=1.4", "python-gdcm>=3.0.10"]
TENSORBOARD = ["tensorboard>=2.14"]
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
TEST = [
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
    "selenium>=4.20",
    "fastapi>=0.110",  # the example of docs/export.md, which httpx asks
    "httpx>=0.27",
]

setup(
    name="simsid",
    version=VERSION,
    description="Unsupervised anomaly detection in chest radiographs with space-aware memories and fused GPU kernels",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["simsid", "simsid.*"]),
        "simsid.kernels",
        *(f"simsid.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"simsid.kernels": "kernels"},
    package_data={
        "simsid": ["py.typed", "samples/*", "samples/*/*"],
        "simsid.models": ["weights/*", "shipped/*/*"],
        "simsid.report": ["templates/*"],
    },
    install_requires=[
        "torch>=2.10",
        "triton; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=10.3",
        "scikit-learn>=1.4",
        "joblib>=1.3",
        "safetensors>=0.4.3",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "nvtx>=0.2.12",
        "tqdm>=4.66",
        "tyro>=0.9",
        "filelock>=3.13",
        "pydicom>=3.0.1",
    ],
    extras_require={
        "dicom": CODECS,
        "onnx": ONNX,
        "tensorboard": TENSORBOARD,
        "test": [*TEST, *CODECS, *TENSORBOARD, *ONNX],
    },
    entry_points={"console_scripts": ["simsid = simsid.__main__:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
