"""What a YAML file may say: the sections, their settings and the rules that tie them together."""
