"""The settings of a tab, which the address of the page holds: what they are when it opens, and after a change.

`assets/address.js` is the browser's part.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import gradio as gr

from .components import QUIET


class Settings:
    """Settings of a tab by their names in the address; a name that is not there stands for the value at the start."""

    def __init__(self, places: Mapping[str, gr.Slider | gr.Radio]) -> None:
        self.places = dict(places)
        self.inputs = list(self.places.values())

    def keep(self) -> None:
        """Writes what a visitor chooses into the address."""
        starts = json.dumps({name: place.value for name, place in self.places.items()})
        sliders = {name: place for name, place in self.places.items() if isinstance(place, gr.Slider)}
        ranges = json.dumps({name: [place.minimum, place.maximum] for name, place in sliders.items()})
        # One listener each, else gradio would send the value of the one that was changed last for all of them.
        gr.on(
            [place.input for place in self.inputs],
            None,
            self.inputs,
            None,
            js=f"(...values) => window.macosnetAddress.keep({starts}, {ranges}, values)",
            **QUIET,
        )

    def read(self, request: gr.Request, quiet: bool = False, **starts: Any) -> dict[str, Any]:
        """What the address says; a warning on the page names a value that its setting does not take.

        Args:
            request: of the page.
            quiet: warns of nothing.
            starts: values at the start that differ from those of the components.
        """
        asked = dict(getattr(request, "query_params", None) or {})
        found, faults = {}, []
        for name, place in self.places.items():
            found[name] = starts.get(name, place.value)
            if name not in asked:
                continue
            value = _value(place, asked[name])
            if value is None:
                faults.append(f"{name}={asked[name][:40]}")
            else:
                found[name] = value
        if faults and not quiet:
            said = f"The address of this page asks for {' and '.join(faults)}, which there is not; it is left out."
            gr.Warning(html.escape(said, quote=False))
        return found


def _value(place: gr.Slider | gr.Radio, text: str) -> Any:
    """A value that a component takes, or None."""
    if isinstance(place, gr.Radio):
        return text if text in [value for _, value in place.choices] else None
    try:
        value = float(text)
    except ValueError:
        return None
    if not place.minimum <= value <= place.maximum:
        return None
    return round(value / place.step) * place.step if place.step >= 1 else round(value, 4)
