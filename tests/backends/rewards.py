"""Rewards of the backend tests, named by recipes through their import path."""

import asyncio
import contextlib
import os
import urllib.request


def letters(completions, **kwargs):
    """Share of letters, graded: groups of equal rewards are rare even for an untaught model."""
    return [
        sum(character.isalpha() for character in completion) / max(len(completion), 1) for completion in completions
    ]


_calls = {"raises": 0, "waits": 0}


def _is_due(kind):
    """Whether something shall go wrong: in the third batch of the second process."""
    _calls[kind] += 1
    return os.environ.get("RANK") == "1" and _calls[kind] == 3 and not os.environ.get("BACKENDS_FIRST_CALL")


def raises_on_the_second_process(completions, **kwargs):
    if _is_due("raises"):
        raise KeyError("no such answer")
    return letters(completions)


def waits_for_a_server(completions, **kwargs):
    if _is_due("waits"):
        with contextlib.suppress(Exception):  # as clients do that give nothing when their judge fails
            urllib.request.urlopen(os.environ["REWARD_SERVER"])
    return letters(completions)


async def waits_async_for_a_server(completions, **kwargs):
    if _is_due("waits"):
        host, port = os.environ["REWARD_SERVER"].removeprefix("http://").split(":")
        reader, _ = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await reader.read()
    return letters(completions)
