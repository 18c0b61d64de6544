import pytest
import torch

from mimoflash.benchmarks.cuda_compile import SHARED_BYTES, compile_decoding
from mimoflash.config import ModelConfig
from mimoflash.kernels.paged_attention import is_interpreted


@pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_of_decoding_compiles_for_cards_that_are_not_here(capability):
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled")
    taken = []
    compile_decoding(ModelConfig.tiny(), torch.bfloat16, [capability], taken.append, drafts=1)
    assert {x["kernel"] for x in taken} == {"attend", "merge", "rotate_and_store", "grouped_linear"}
    assert {x["FP8"] for x in taken if x["kernel"] == "grouped_linear"} == {False, True}
    assert max(x["shared_bytes"] for x in taken) <= SHARED_BYTES
    assert not any(x["stack_bytes"] for x in taken)  # nothing is spilled
