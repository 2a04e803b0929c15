"""Use of an installed attention_zoo: import, a training step, saving, sampling and the contract checks."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import attention_zoo
from attention_zoo import LanguageModel, generate
from attention_zoo.testing import check_block

package = Path(attention_zoo.__file__).parent
assert (package / "py.typed").exists(), "py.typed is missing from the wheel"
assert "site-packages" in package.parts, f"attention_zoo must be imported from the wheel, got {package}"

torch.manual_seed(0)
model = LanguageModel(num_tokens=256, dim=64, depth=2, heads=2, attention=["full", "cosine_sim"])
tokens = torch.randint(0, 256, (2, 33))
model.loss(tokens).backward()
with TemporaryDirectory() as folder:
    model.save(folder)
    loaded = LanguageModel.load(folder)
prompt = tokens[:, :5]
assert torch.equal(generate(model, prompt, 8, temperature=0), generate(loaded, prompt, 8, temperature=0))
full = attention_zoo.FullAttention(32, heads=2)
recurrence = attention_zoo.GateLoopAttention(32, gradient_fraction=1.0)  # without numba where it is not installed
for block in (full, recurrence):
    check_block(lambda block=block: block, dim=32, causal=True, lengths=(1, 7)).raise_for_failures()
print(f"attention_zoo {attention_zoo.__version__} works from the wheel")
