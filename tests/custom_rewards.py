"""What a user's own module of rewards may hold, right and wrong; the tests of rewards import it by dotted path."""


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def difficulty_reward(completions, difficulty, bonus=0.0, **kwargs):
    return [value + bonus for value in difficulty]
