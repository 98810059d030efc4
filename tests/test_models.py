"""Claims about architectures: each trains as with PEFT, or is refused in one line.

All of it takes about four minutes on one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import CASES, configuration, outcome
from safetensors.torch import load_file
from scripts import ROOT, script

from rolora.model.peft import read_adapter
from rolora.run import runs

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def page() -> tuple[Any, list[str]]:
    """The script that writes docs/models.md, and the page's lines."""
    return script("docs/make_models.py"), (ROOT / "docs" / "models.md").read_text().splitlines()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "task"), CASES, ids=str)
def test_an_architecture_trains_as_with_peft_or_is_refused_in_one_line_as_its_page_says(
    model_type: str, task: str, tmp_path: Path, page: tuple[Any, list[str]]
) -> None:
    found = outcome(model_type, task, tmp_path)
    pages, lines = page
    assert pages.line(model_type, task, found) in lines
    for said in pages.refusals(model_type, task, found):
        assert said in lines
        assert "lora.target_modules" in said or "use another model" in said or "model.path" in said
    targets = found.targets(model_type)
    if targets is None:
        return
    adapters = []
    for bank in (3, 1):
        run = runs.start(configuration(tmp_path, task, targets, bank=bank), tmp_path / f"{bank}")
        list(run.rounds())
        adapters.append(load_file(tmp_path / f"{bank}" / "adapter" / "adapter_model.safetensors"))
    start = run.experiment.start.server.adapter
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=1e-3, atol=1e-5), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in adapters[0].items())

    base, adapter = run.experiment.base, tmp_path / "1" / "adapter"
    auto = transformers.AutoModelForSequenceClassification
    auto = transformers.AutoModelForCausalLM if task == "causal_lm" else auto
    config = transformers.AutoConfig.from_pretrained(adapter / "model_config.json")
    plain = auto.from_pretrained(tmp_path / "model", config=config)
    theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    texts = ["the cat sat on the mat", "a bad film with a thin plot and no heart"]
    inputs = base.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with base.holding(read_adapter(adapter, base.specs)), torch.no_grad():
        ours = base.model(**inputs).logits
    with torch.no_grad():
        expected = theirs(**inputs).logits
    if task == "causal_lm":
        real = inputs["attention_mask"].bool()
        ours, expected = ours[real], expected[real]
    assert torch.allclose(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_page_of_models_lists_each_once_and_nothing_else(page: tuple[Any, list[str]]) -> None:
    rows = [line.split("|")[1:3] for line in page[1] if line.startswith("| `")][1:]
    assert [(name.strip(" `"), task.strip()) for name, task in rows] == CASES
