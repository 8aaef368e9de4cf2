"""Checks an ONNX model and runs it by ONNX Runtime.

    run.py MODEL IMAGES LOGITS [--plain] [--time]

IMAGES and LOGITS are raw float32, as many whole images as there are. With --plain each
operator is computed as it stands, without the runtime's optimizations. With --time prints the milliseconds of one image
and of a batch of 64, the best of several, on one thread.
"""

import sys
import time

import numpy
import onnx
import onnxruntime

model, images, logits = sys.argv[1:4]
onnx.checker.check_model(model, full_check=True)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if "--plain" in sys.argv:
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
(given,) = session.get_inputs()
x = numpy.fromfile(images, dtype="<f4").reshape([-1, *given.shape[1:]])
parts = [session.run(None, {given.name: x[i : i + 250]})[0] for i in range(0, len(x), 250)]
numpy.concatenate(parts).astype("<f4").tofile(logits)
if "--time" in sys.argv:
    for batch in (1, 64):
        part = numpy.ascontiguousarray(numpy.resize(x, (batch, *x.shape[1:])))
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            session.run(None, {given.name: part})
            best = min(best, time.perf_counter() - start)
        print(f"batch {batch}: {1e3 * best:.2f} ms")
