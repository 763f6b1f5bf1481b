"""Three hundred steps on two processes: memory, hooks and tensors stay where they are after step 50."""

import torch

STEPS = 300
SETTLED = 50  # allocator, caches of compiled shapes and the logs' ring buffers have reached their size by then
# Bytes per step. The graph that an earlier version kept alive grew by 17 MB a step; the logs grow by 3 kB.
MOST_GROWTH = 20_000


def slope(steps, values):
    """Least-squares slope of values over steps."""
    steps = torch.tensor(steps, dtype=torch.float64)
    values = torch.tensor(values, dtype=torch.float64)
    steps = steps - steps.mean()
    return ((steps * (values - values.mean())).sum() / steps.square().sum()).item()


def test_memory_is_flat(shared_run, report):
    run = shared_run(
        "soak",
        processes=2,
        sampling=None,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        train_size=256,
        logging_steps=10,
    )

    for rank, record in enumerate(run.records):
        lines = [line for line in record if line["kind"] == "step"]
        assert [line["step"] for line in lines] == list(range(STEPS))
        settled = [line for line in lines[SETTLED:] if "resident" in line]
        resident = [line["resident"] for line in settled]
        growth = slope([line["step"] for line in settled], resident)
        tensors = [line["tensors"] for line in settled]
        report.append(
            f"soak, process {rank}: {', '.join(f'{value / 2**20:.1f}' for value in resident)} MiB every 25 steps from {SETTLED}, "
            f"slope {growth:.0f} bytes a step; hooks {settled[0]['hooks']} to {settled[-1]['hooks']}, tensors {tensors}"
        )
        assert growth < MOST_GROWTH
        assert len({line["hooks"] for line in lines}) == 1
        assert max(tensors) - min(tensors) <= 5
