"""The arithmetic of PPO: tensors in, tensors out, and nothing that knows of configs, models or ranks.

One module per step of the data flow: ``logprobs`` and ``kl`` compare policies, ``rewards`` shapes what ``advantages``
and ``group_advantages`` spread over the tokens, ``policy_losses`` and ``value_losses`` price each token,
``token_selection`` says which are priced apart, ``aggregation`` reduces tokens to a number, ``importance`` and
``kl_control`` correct and steer, ``masking`` and ``groups`` serve them all.

Conventions everywhere: B sequences, R response positions; masks are bool, True = real token; tensors are fp32 and come
first, hyperparameters are keyword-only. What stands outside a mask may be NaN or inf and reaches neither a result nor a
gradient: ``torch.where`` blanks it, before any arithmetic where a gradient flows.
"""
