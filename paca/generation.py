"""Text from a model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt.

    Args:
        model: a causal language model; its mode and the random state are left as they were.
        tokenizer: its tokenizer.
        prompts: texts to continue, or, with `chat`, what the user says.
        chat: whether to put each prompt through the tokenizer's chat template.
        max_new_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the drawing.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: if `chat` is asked of a tokenizer without a chat template, or a prompt has no tokens, or too many.
    """
    import torch

    from paca.pretrained import max_positions

    if chat and not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template, so it cannot chat")
    training, device = model.training, next(model.parameters()).device
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    answers = []
    model.eval()
    try:
        for prompt in prompts:
            if chat:
                turn = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            else:
                ids = _without_end(tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"])
            if ids.shape[1] == 0:
                raise ValueError(f"the prompt {prompt!r} has no tokens")
            longest = max_positions(model.config, tokenizer)
            if longest and ids.shape[1] + max_new_tokens > longest:
                raise ValueError(
                    f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the {longest} "
                    f"that this model was made for; max_new_tokens may be {max(0, longest - ids.shape[1])} here"
                )
            with torch.no_grad(), _own_random_state(device, seed):
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=torch.ones_like(ids).to(device),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                    **drawn,
                )
            answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    finally:
        model.train(training)
    return answers


@contextmanager
def _own_random_state(device: Any, seed: int) -> Iterator[None]:
    """Draw from `seed` inside the block and go on outside as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _without_end(tokenizer: Any, ids: Any) -> Any:
    """A prompt without the end-of-text token that some tokenizers append: the text goes on."""
    return ids[:, :-1] if ids.shape[1] and int(ids[0, -1]) == tokenizer.eos_token_id else ids
