"""A GPU's rules, kept on a machine without one.

``device`` makes tensors that say they lie on a GPU while their numbers are the CPU's, and a mode under which operators
on them obey CUDA's rules and are counted. The ``rules_*.py`` beside it run the toolkit's own decoding, role pass,
update and trainers there. Registering a device is for good, so they need a process of their own:
``tests/test_cuda_rules.py`` starts it, and ``python -m pytest tests/cuda_rules/rules_of_decoding.py`` runs one file of
them."""
