"""Model cards in Markdown, as the Hugging Face hub shows them."""

from __future__ import annotations

import json
from typing import Any

from attention_zoo.saving.encoding import encode

FACTS = ("data", "score", "command")  # the sections of a card beside the configuration


def write_card(model: Any, **facts: str | None) -> str:
    """The text of a model card: what the model is, how to load it, its configuration, and the given facts.

    Args:
        model: a `SavedModel`.
        facts: a sentence each: the `data` it was trained on, its `score`, the `command` that trained it.
    """
    name, package = type(model).__name__, type(model).__module__
    if package.startswith("attention_zoo."):
        package = "attention_zoo"
    size = sum(parameter.numel() for parameter in model.parameters())
    sections = "".join(f"\n## {fact.capitalize()}\n\n{facts.get(fact) or 'Not stated.'}\n" for fact in FACTS)
    return f"""---
library_name: attention-zoo
tags:
- attention-zoo
---

# {name}

A `{name}` of attention_zoo, {size:,} parameters. `pip install attention-zoo`, then:

```python
from {package} import {name}

model = {name}.from_pretrained("...")  # this repository, or a folder with its files
```
{sections}
## Configuration

```json
{json.dumps(encode(model.saved_arguments()), indent=2)}
```
"""
