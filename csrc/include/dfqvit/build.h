// What a build may say of itself. For the bindings only.
#pragma once

// Operators are registered as <namespace>::<name>, their compiled backends as <namespace>_cpu::<name> and
// <namespace>_cuda::<name>. A build for the Hugging Face Hub has a namespace of its own (scripts/hub_kernels.py).
#ifndef DFQVIT_NAMESPACE
#define DFQVIT_NAMESPACE dfqvit
#endif
#define DFQVIT_PASTE(a, b) a##b
#define DFQVIT_PASTE_EXPANDED(a, b) DFQVIT_PASTE(a, b)
#define DFQVIT_OPERATORS(device) DFQVIT_PASTE_EXPANDED(DFQVIT_NAMESPACE, _##device)

#ifndef DFQVIT_CUDA_ARCHS  // the Hub's builder cannot pass a text
#define DFQVIT_CUDA_ARCHS ""
#endif
