"""The kernel as a PyTorch operator: its schema, its fake, its gradients, and its results beside PyTorch's own."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meliad_edge.models import scoring_kernel
from meliad_edge.models.scoring import ScoringParameters, patch_entropy_score
from meliad_edge.models.scoring_kernel import fused_patch_entropy_score
from meliad_edge.runtime.kernel_library import find_kernel_library

PARAMETERS = ScoringParameters(
    n_normal=29,
    top_cells=4,
    softness=0.5,
    normal_scale=1.125,
    anomaly_scale=0.625,
    bias=-0.375,
    kappa=0.4375,
    offset=0.25,
)


@pytest.fixture
def with_kernel() -> None:
    if find_kernel_library("c") is None:
        pytest.skip("no libmeliad_kernels.so: installing it needs a C++ compiler")


def inputs(seed: int = 0, images: int = 3, height: int = 5, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, 33, height, width, generator=random),
        torch.randn(40, 33, generator=random),
        torch.randn(33, generator=random) / 33**0.5,
    )


def assert_agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_computes_what_pytorch_computes(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arguments = inputs(height=16, width=16)
    with torch.inference_mode():
        outputs = fused_patch_entropy_score(*arguments, PARAMETERS)
        assert_agree(outputs, patch_entropy_score(*arguments, PARAMETERS))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for mine, alone in zip(outputs, fused_patch_entropy_score(*arguments, PARAMETERS), strict=True):
        assert torch.equal(mine, alone), "threads change a bit"


@pytest.mark.usefixtures("with_kernel")
def test_strides_do_not_matter() -> None:
    embeddings, prototypes, direction = inputs()
    strided = embeddings.contiguous(memory_format=torch.channels_last), prototypes.t().contiguous().t(), direction
    for mine, plain in zip(
        fused_patch_entropy_score(*strided, PARAMETERS),
        fused_patch_entropy_score(embeddings, prototypes, direction, PARAMETERS),
        strict=True,
    ):
        assert torch.equal(mine, plain)


@pytest.mark.usefixtures("with_kernel")
def test_prototypes_that_change_are_packed_again() -> None:
    embeddings, prototypes, direction = inputs()
    fused_patch_entropy_score(embeddings, prototypes, direction, PARAMETERS)
    prototypes *= 1.5
    changed = fused_patch_entropy_score(embeddings, prototypes, direction, PARAMETERS)
    assert_agree(changed, patch_entropy_score(embeddings, prototypes, direction, PARAMETERS))
    other = replace(PARAMETERS, softness=0.9)
    assert_agree(
        fused_patch_entropy_score(embeddings, prototypes, direction, other),
        patch_entropy_score(embeddings, prototypes, direction, other),
    )


def test_no_images() -> None:
    score, evidence, nearest = fused_patch_entropy_score(*inputs(images=0), PARAMETERS)
    assert [list(tensor.shape) for tensor in (score, evidence, nearest)] == [[0], [0, 5, 7], [0, 2, 5, 7]]


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself
def test_is_a_well_formed_operator() -> None:
    arguments = [tensor.requires_grad_() for tensor in inputs()]
    torch.library.opcheck(torch.ops.meliad.patch_entropy_score.default, (*arguments, *_scalars(PARAMETERS)))


def test_gradients_are_those_of_the_plain_function() -> None:
    ours, theirs = ([tensor.requires_grad_() for tensor in inputs()] for _ in range(2))
    weights = torch.randn(3), torch.randn(3, 5, 7)
    for tensors, function in ((ours, fused_patch_entropy_score), (theirs, patch_entropy_score)):
        score, evidence, _ = function(*tensors, PARAMETERS)
        ((score * weights[0]).sum() + (evidence * weights[1]).sum()).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(1, 32, 5, 7)}, r"embeddings \[1, 32, 5, 7\].*expected \[N, D, H, W\]"),
        ({"direction": torch.zeros(32)}, r"direction \[32\].*expected"),
        ({"embeddings": torch.zeros(1, 33, 5, 7, dtype=torch.float64)}, "embeddings are torch.float64"),
        ({"parameters": replace(PARAMETERS, n_normal=40)}, "do not fit n_normal = 40"),
        ({"parameters": replace(PARAMETERS, top_cells=36)}, "do not fit .* top_cells = 36"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    embeddings, prototypes, direction = inputs()
    arguments = {"embeddings": embeddings, "prototypes": prototypes, "direction": direction, "parameters": PARAMETERS}
    with pytest.raises(ValueError, match=message):
        fused_patch_entropy_score(**(arguments | change))


def test_tensors_on_several_devices_are_refused() -> None:
    embeddings, prototypes, direction = inputs()
    with pytest.raises(ValueError, match="are on cpu, meta; move them to one device"):
        scoring_kernel._check(embeddings, prototypes.to("meta"), direction, PARAMETERS)


def test_without_the_library_pytorch_does_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MELIAD_EDGE_KERNEL", "off")
    scoring_kernel._kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert_agree(
                    fused_patch_entropy_score(*inputs(), PARAMETERS), patch_entropy_score(*inputs(), PARAMETERS)
                )
    finally:
        scoring_kernel._kernel.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "there is no compiled scoring kernel for cpu tensors; PyTorch's own operators do its work"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    embeddings, prototypes, direction = (tensor.cuda() for tensor in inputs())
    embeddings, prototypes = embeddings.to(dtype), prototypes.to(dtype)
    outputs = fused_patch_entropy_score(embeddings, prototypes, direction, PARAMETERS)
    plain = patch_entropy_score(embeddings.double(), prototypes.double(), direction.double(), PARAMETERS)
    assert_agree(outputs, tuple(tensor.to(mine.dtype) for tensor, mine in zip(plain, outputs, strict=True)))


def _scalars(parameters: ScoringParameters) -> tuple[float, ...]:
    return tuple(getattr(parameters, name) for name in ScoringParameters.__slots__)
