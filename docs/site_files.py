"""A hook of mkdocs: the site's pages are the repository's, under the paths they have in it.

So a link leads to the same place in the repository and on the site, and the strict build checks it.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/*.png",
    "docs/*.svg",
    "docs/notebooks/*.ipynb",
    "experiments/**/*.md",
    "deploy/*",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that code hosts give them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and the repository's pages, pictures and what pages link to."""
    kept = [file for file in files if file.src_dir != config.docs_dir]
    for path in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern)):
        source = path.relative_to(ROOT).as_posix()
        kept.append(File.generated(config, source, abs_src_path=str(path)))
    return Files(kept)
