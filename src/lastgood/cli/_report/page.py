"""The page: one HTML file that needs nothing else, neither the network nor a file beside it.

The data stands in a JSON block that no name in it can end. A policy in the page lets the browser run and apply
nothing but the very script and style that are put in here: so even markup that got in would do nothing.
"""

import base64
import hashlib
from html import escape
from importlib.resources import files
from string import Template

import msgspec

from lastgood.cli._report import sections, sections_of_state
from lastgood.cli._report.data import Report

_SCRIPTS = ("common.js", "tables.js", "timeline.js", "squarify.js", "map.js", "start.js")

_JSON_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def json_block(report: Report) -> str:
    """The data as JSON without any character that HTML or old scripts could take for an end."""
    return msgspec.json.encode(report).decode().translate(_JSON_ESCAPES)


def render(report: Report) -> str:
    """The whole page."""
    style = _resource("page.css")
    script = f'(() => {{\n"use strict";\n{"".join(map(_resource, _SCRIPTS))}}})();\n'
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_resource("page.html")).substitute(
        policy=escape(policy),
        title=escape(report.name),
        style=style,
        script=script,
        data=json_block(report),
        header=sections.header(report),
        saves=sections.saves(report.saves),
        retention=sections.retention(report.retention),
        space=sections_of_state.space(report.space, report.space_problem),
        movement=sections_of_state.movement(report.movement, report.movement_problem),
        footer=sections.footer(report),
    )


def _resource(name: str) -> str:
    return files("lastgood.cli._report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
