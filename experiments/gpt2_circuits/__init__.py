"""EAP, EAP-IG and ACDC on greater-than and IOI, where GPT-2 and the prompts are at hand."""
