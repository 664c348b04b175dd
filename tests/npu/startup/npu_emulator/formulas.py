"""The documented formulas of the other fused operators, in float32, and of their gradients."""

import torch

from npu_emulator.fused import plain_only


def gradients(function, inputs, gradient):
    "Gradients of a function's result in float32 copies of the inputs, by torch's own rules."
    with torch.enable_grad():
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradient.float())


def rms_norm(input, gamma, epsilon):
    "npu_rms_norm: the normed input and the reciprocal root of the mean square."
    dims = tuple(range(input.dim() - gamma.dim(), input.dim()))
    if input.shape[-gamma.dim() :] != gamma.shape:
        raise ValueError(f'gamma {tuple(gamma.shape)} is not the end of {tuple(input.shape)}')
    x = input.float()
    rstd = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


def rms_norm_gradient(dy, input, gamma, rstd):
    "npu_rms_norm_backward; epsilon is no argument, it is within rstd."
    dims = tuple(range(input.dim() - gamma.dim(), input.dim()))
    x, rstd, pull = input.float(), rstd.float(), dy.float() * gamma.float()
    dx = rstd * pull - x * rstd**3 * (x * pull).mean(dims, keepdim=True)
    return dx, (dy.float() * x * rstd).reshape(-1, *gamma.shape).sum(0)


def rotated(x, mode):
    "Each pair (a, b) of the last dim as (-b, a): halves of it, or neighbours."
    if mode == 'half':
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


def rotary_mul(input, r1, r2, rotary_mode, **options):
    "npu_rotary_mul: input · r1 + rotated input · r2."
    plain_only('npu_rotary_mul', options, rotate=None)
    if input.shape[-1] % 2 or input.shape[-1] >= 896:
        raise ValueError(f'npu_rotary_mul takes an even D below 896, not {input.shape[-1]}')
    for name, x in (('r1', r1), ('r2', r2)):
        if (
            x.dim() != input.dim()
            or x.shape[-1] != input.shape[-1]
            or any(a not in (1, b) for a, b in zip(x.shape, input.shape))
        ):
            raise ValueError(f'{name} {tuple(x.shape)} does not fit an input of {tuple(input.shape)}')
    return input.float() * r1.float() + rotated(input.float(), rotary_mode) * r2.float()


def rotary_mul_gradient(grad, input, r1, r2, rotary_mode):
    "npu_rotary_mul_backward."
    return gradients(lambda *x: rotary_mul(*x, rotary_mode), (input, r1, r2), grad)


def swiglu(input, dim):
    """npu_swiglu: the first half, gated by itself, times the second.

    The documentation takes no tensor that is not contiguous.
    """
    if not input.is_contiguous():
        raise ValueError(
            f'npu_swiglu takes contiguous tensors, not strides {input.stride()} of {tuple(input.shape)}'
        )
    a, b = input.float().chunk(2, dim)
    return torch.nn.functional.silu(a) * b


def swiglu_gradient(grad_output, input, dim):
    "npu_swiglu_backward."
    return gradients(lambda x: swiglu(x, dim), (input,), grad_output)


def fused_adamw(
    self,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    amsgrad,
    maximize,
    grad_scale,
    found_inf,
):
    """torch._fused_adamw_, in place.

    As on the device, steps may be whole numbers, and a scale of gradients is not looked at.
    """
    plain_only(
        '_fused_adamw_',
        dict(amsgrad=amsgrad, grad_scale=grad_scale, found_inf=found_inf),
        amsgrad=False,
        grad_scale=None,
        found_inf=None,
    )
    for weight, gradient, mean, square, step in zip(self, grads, exp_avgs, exp_avg_sqs, state_steps):
        gradient = -gradient if maximize else gradient
        weight.mul_(1 - lr * weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(step)
        weight.addcdiv_(
            mean, (square.sqrt() / (1 - beta2**step) ** 0.5).add_(eps), value=-lr / (1 - beta1**step)
        )


def matmul_gradient(grad, self, other, mask):
    """torch's own matmul_backward, which only this device has: matrices, or a stack of them times one matrix
    or as many.
    """
    right = self.flatten(0, -2).mT @ grad.flatten(0, -2) if other.dim() == 2 else self.mT @ grad
    return grad @ other.mT if mask[0] else None, right if mask[1] else None


FORMULAS = {
    'npu_rms_norm': rms_norm,
    'npu_rms_norm_backward': rms_norm_gradient,
    'npu_rotary_mul': rotary_mul,
    'npu_rotary_mul_backward': rotary_mul_gradient,
    'npu_swiglu': swiglu,
    'npu_swiglu_backward': swiglu_gradient,
}
ATEN_FORMULAS = {'_fused_adamw_': fused_adamw, 'matmul_backward': matmul_gradient}
