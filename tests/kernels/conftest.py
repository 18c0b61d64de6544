import pytest
import torch
from triton_device import DEVICE


@pytest.fixture(scope="module", params=["reference", "triton"])
def implementation(request):
    """The module's `kernel` in PyTorch and in Triton: on the card, or on the CPU by its interpreter (TRITON_INTERPRET=1
    before Python starts)."""
    kernel = request.module.kernel
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(kernel, "has_triton", lambda device: False)
        elif not kernel.has_triton(torch.device(DEVICE)):
            pytest.skip("needs Triton, and a GPU or TRITON_INTERPRET=1")
        yield request.param
