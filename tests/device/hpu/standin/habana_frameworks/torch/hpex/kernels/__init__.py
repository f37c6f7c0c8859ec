import torch


class FusedSDPA:
    """optimum-habana imports it without a guard."""

    @staticmethod
    def apply(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, *rest, **options):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
