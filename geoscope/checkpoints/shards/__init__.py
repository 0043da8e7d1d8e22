"""Shards of trainers: verl's FSDP and torch DCP."""
