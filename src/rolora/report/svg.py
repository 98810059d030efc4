"""A figure as an ``<svg>`` element that stands inside an HTML page and takes on its theme."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from rolora.report.figures import BAND, GRID, INK, PALETTE, rendered

THEME = {colour: f"var(--series-{n})" for n, colour in enumerate(PALETTE)} | {
    INK: "currentColor",
    GRID: "var(--grid)",
    BAND: "var(--band)",
}


def inline_svg(figure: Figure, name: str, description: str = "") -> str:
    """The figure as an ``<svg>`` element to stand inside an HTML page.

    Its id is ``name`` and ids within begin with it, its colours are ``THEME``'s, it has no size of
    its own, and its places are rounded to 0.01 pt. It is announced as ``description``, or hidden
    from screen readers without one. A link becomes a group of the class ``value`` with its URL
    as text; see ``_readout``.
    """
    root = ElementTree.fromstring(rendered(figure, "svg", facecolor="none"))
    for element in root.iter():
        for child in list(element):
            if _bare(child.tag) in ("metadata", "style"):
                element.remove(child)
        element.tag = _bare(element.tag)
        plain = {_bare(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for attribute, value in plain.items():
            element.set(attribute, _adopt(attribute, value, f"{name}-"))
    for link in list(root.iter("a")):
        _readout(link, root.attrib["viewBox"].split()[2])
    for attribute in ("width", "height", "version"):
        del root.attrib[attribute]
    root.set("id", name)
    if description:
        root.attrib |= {"role": "img", "aria-label": description}
    else:
        root.set("aria-hidden", "true")
    return ElementTree.tostring(root, encoding="unicode")


def _readout(link: ElementTree.Element, right: str) -> None:
    """Make a link a group of its shape and its URL as text, which ends at x = ``right``.

    It needs no script: the page's style shows the text while the shape is pointed at.
    """
    words = link.attrib["href"]
    link.tag, link.attrib = "g", {"class": "value"}
    for shape in link.iter("use"):
        shape.attrib.pop("style", None)
    ElementTree.SubElement(link, "text", {"x": right, "y": "12"}).text = words


def _bare(name: str) -> str:
    """A name without its XML namespace: HTML knows SVG's elements by their plain names."""
    return name.rpartition("}")[2]


def _adopt(attribute: str, value: str, prefix: str) -> str:
    """An attribute's value with its ids under ``prefix`` and its colours and font the page's."""
    if attribute == "id":
        return prefix + value
    if attribute == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if attribute in ("d", "x", "y", "transform"):
        return re.sub(r"-?\d+\.\d+", lambda hit: f"{float(hit[0]):.2f}", value)
    value = value.replace("url(#", f"url(#{prefix}")
    if attribute != "style":
        return value
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]*; ", "", value)
    return re.sub(r"#[0-9a-f]{6}", lambda hit: THEME.get(hit[0], hit[0]), value)
