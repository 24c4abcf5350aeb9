// SGD with momentum and weight decay, and the search for bad gradients. real is float or double. Python side: tinydet/optim.py
// variants: real=float; real=double
// flags: --fmad=false
// (no fused multiply-add: to the bit what NumPy does; memory sets the time anyway. CuPy's -ftz=true makes float denormals 0.)
//
// sgd_check   *trouble = place if it is 0 and g holds NaN or infinity, place > 0: grid ceil(n / 256), no shared memory
// sgd_step    one thread per number, in place, then g = 0; nothing at all where *trouble is not 0: 24 bytes a float
//   plain: v = momentum * v + (g + decay * w), w = w - lr * v;  caffe: v = momentum * v + lr * (g + decay * w), w = w - v

extern "C" __global__
void sgd_check(const real* g, int* trouble, int n, int place)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (unsigned)n && g[i] - g[i] != 0)
        atomicCAS(trouble, 0, place);                               // all that find something write the same
}

extern "C" __global__
void sgd_step(real* w, real* g, real* v, const int* trouble, int n, real momentum, real lr, real decay, int caffe)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (unsigned)n || *trouble) return;
    real velocity = v[i] * momentum;
    if (caffe) {
        velocity += lr * (g[i] + decay * w[i]);
        w[i] -= velocity;
    } else {
        velocity += g[i];
        if (decay != 0)
            velocity += decay * w[i];
        w[i] -= lr * velocity;
    }
    v[i] = velocity;
    g[i] = 0;
}
