"""Everything is declared in pyproject.toml; this file is where the native core will be built."""

from setuptools import setup

setup()
