"""The same work in PyTorch, on the same arrays; nothing where torch or its GPU is absent.

Torch is no dependency: it is imported when the first rival is made.
"""

from collections.abc import Callable
import functools
import importlib.util

from moe_ep.bench.timing import Contender


def available() -> bool:
    """Returns whether torch is installed and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def version() -> str:
    """Returns torch's version, or why there is none."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    return torch.__version__


def shared(array):
    """Returns a torch tensor over the memory of a JAX array."""
    import torch

    return torch.from_dlpack(array)


def _contenders(functions: dict[str, Callable], *arrays) -> dict[str, Contender]:
    """Returns a contender for each function, applied to the arrays as tensors."""
    import torch

    tensors = [shared(array) for array in arrays]

    def wait(out):
        torch.cuda.synchronize()
        return out

    return {
        name: Contender(lambda function=function: function(*tensors), wait) for name, function in functions.items()
    }


def _none_without_torch(rivals):
    """Makes a function of rivals return none where torch or its GPU is absent."""

    @functools.wraps(rivals)
    def checked(*args) -> dict[str, Contender]:
        return rivals(*args) if available() else {}

    return checked


@_none_without_torch
def copy(values) -> dict[str, Contender]:
    """A copy through device memory."""
    import torch

    target = torch.empty_like(shared(values))
    return _contenders({"torch": target.copy_}, values)


@_none_without_torch
def gemm_gelu(x, w) -> dict[str, Contender]:
    """The rival of gelu(x @ w): cuBLASLt, which applies it in the product's epilogue, with a bias of zeros.

    What torch.compile makes of it are cuBLAS's product and one more kernel, as eager torch does.
    """
    import torch

    bias = torch.zeros(w.shape[1], dtype=torch.bfloat16, device="cuda")
    return _contenders({"cublaslt_fused": lambda x, w: torch._addmm_activation(bias, x, w, use_gelu=True)}, x, w)


@_none_without_torch
def mlp_forward(x, w_in, w_out) -> dict[str, Contender]:
    """The rival of gelu(x @ w_in) @ w_out."""
    import torch

    bias = torch.zeros(w_in.shape[1], dtype=torch.bfloat16, device="cuda")
    return _contenders({
        "cublaslt_fused": lambda x, w_in, w_out: torch._addmm_activation(bias, x, w_in, use_gelu=True) @ w_out,
    }, x, w_in, w_out)  # fmt: skip


@_none_without_torch
def mlp_forward_backward(x, w_in, w_out, d_out) -> dict[str, Contender]:
    """Rivals of the MLP's output and the gradients of its three operands."""
    import torch

    forward = torch.compile(lambda x, w_in, w_out: _gelu(x @ w_in) @ w_out)

    def with_gradients(x, w_in, w_out, d_out):
        operands = [tensor.detach().requires_grad_() for tensor in (x, w_in, w_out)]
        out = forward(*operands)
        return out.detach(), *torch.autograd.grad(out, operands, d_out)

    return _contenders({"torch_compile": with_gradients}, x, w_in, w_out, d_out)


@_none_without_torch
def grouped_gelu(rows, w, counts) -> dict[str, Contender]:
    """Rivals of gelu(rows of each group @ its matrix) over rows without padding."""
    import torch

    ends = _ends(counts)
    lengths = [int(count) for count in counts]
    no_bias = torch.zeros(w.shape[2], dtype=torch.bfloat16, device="cuda")

    def grouped(rows, w):
        return _gelu(torch._grouped_mm(rows, w, offs=ends))

    out = torch.empty(rows.shape[0], w.shape[2], dtype=torch.bfloat16, device="cuda")

    def loop(rows, w):
        for group, (part, place) in enumerate(zip(torch.split(rows, lengths), torch.split(out, lengths))):
            if len(part):
                torch._addmm_activation(no_bias, part, w[group], use_gelu=True, out=place)
        return out

    return _contenders({"grouped_mm": grouped, "loop_of_mm": loop}, rows, w)


@_none_without_torch
def grouped_wgrad(rows, d_out, counts) -> dict[str, Contender]:
    """Rivals of each group's rows^T @ d_out."""
    import torch

    ends = _ends(counts)
    return _contenders({"grouped_mm": lambda rows, d_out: torch._grouped_mm(rows.t(), d_out, offs=ends)}, rows, d_out)


@_none_without_torch
def mla_decode(q_latent, q_rope, cache, scale: float) -> dict[str, Contender]:
    """Rivals of absorbed decode over full caches: two batched products about a float32 softmax."""
    import torch

    def attend(q_latent, q_rope, cache):
        scores = torch.bmm(torch.cat([q_latent, q_rope], dim=2), cache.transpose(1, 2))
        weights = torch.softmax(scores.float() * scale, dim=2).to(cache.dtype)
        return torch.bmm(weights, cache[:, :, : q_latent.shape[2]])

    return _contenders({"torch": attend, "torch_compile": torch.compile(attend)}, q_latent, q_rope, cache)


@_none_without_torch
def gather(rows, index) -> dict[str, Contender]:
    """Rivals of rows[index]."""
    return _contenders({"torch": lambda rows, index: rows[index]}, rows, index)


@_none_without_torch
def combine(rows, weights, places) -> dict[str, Contender]:
    """Rivals of the weighted sum of each token's rows."""
    import torch

    def gather_sum(rows, weights, places):
        return (rows[places].float() * weights[:, :, None]).sum(dim=1).to(rows.dtype)

    return _contenders({"torch": gather_sum, "torch_compile": torch.compile(gather_sum)}, rows, weights, places)


def _gelu(x):
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh")


def _ends(counts):
    import torch

    return torch.tensor(counts.cumsum(), dtype=torch.int32, device="cuda")
