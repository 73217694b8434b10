"""The routed layer in PyTorch, with the same weights and tokens; nothing where torch or its GPU is absent."""

from moe_ep.bench import torch_rivals
from moe_ep.bench.timing import Contender


def contenders(module, tokens, top_k: int) -> dict[str, Contender]:
    """Returns the layer written with grouped_mm, as it stands and compiled, in both directions.

    Args:
      module: a routed layer with GELU experts whose weights are of the tokens' type.
      tokens: [t, D].
      top_k: experts of a token.
    """
    if not torch_rivals.available():
        return {}
    import torch

    weights = (module.router.matrix[...], module.experts.w_in[...], module.experts.w_out[...])
    operands = [torch_rivals.shared(array) for array in (tokens, *weights)]
    gradient = torch.randn(tuple(tokens.shape), dtype=torch.bfloat16, device="cuda")

    def layer(*operands):
        return _layer(*operands, top_k)

    def with_gradients(function):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    def wait(out):
        torch.cuda.synchronize()
        return out

    made = {}
    for name, function in {"torch": layer, "torch_compile": torch.compile(layer)}.items():
        made[f"{name} forward"] = Contender(lambda function=function: function(*operands), wait)
        made[f"{name} forward+backward"] = Contender(lambda function=function: with_gradients(function), wait)
    return made


def _layer(tokens, router, w_in, w_out, top_k):
    """Routes by softmax over all experts, weights of the chosen normalised, rows sorted by expert."""
    import torch

    scores = torch.softmax(tokens.float() @ router, dim=1)
    weights, choices = torch.topk(scores, top_k, dim=1)
    weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    expert_of_row, order = torch.sort(choices.flatten(), stable=True)
    experts = torch.arange(1, w_in.shape[0] + 1, device=tokens.device)
    ends = torch.searchsorted(expert_of_row, experts).to(torch.int32)
    rows = tokens[order // top_k]
    hidden = torch.nn.functional.gelu(torch._grouped_mm(rows, w_in, offs=ends), approximate="tanh")
    outputs = torch._grouped_mm(hidden, w_out, offs=ends)
    place = torch.argsort(order)
    returned = outputs[place].view(*choices.shape, -1)
    return (returned.float() * weights[:, :, None]).sum(dim=1).to(tokens.dtype)
