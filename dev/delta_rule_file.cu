// The gated delta rule on numbers from a file, for dev/torch/accuracy.py.
//
//   dev/delta_rule_file INPUT.safetensors OUTPUT.safetensors cuda|cpu
//
// Reads q, k [B,T,Hk,dk], v, do [B,T,Hv,dv] and g, beta [B,T,Hv], of any of the types F32, F64 and BF16, and
// writes o, dq, dk, dv, dg, dbeta in F32: on the GPU those of its bf16 layer, on the CPU those of the float
// one. The readout scale is dk^-1/2. Errors are one line and exit code 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gdn/cpu_layers.h"
#ifdef GDN_CUDA
#include "../gdn_kernels.cuh"
#endif
#include "../gdn/model_checkpoint.h"

namespace {

using namespace gdn;

using Floats = std::vector<float>;

struct Input {
  SafetensorsFile file;

  Floats read(const std::string& name, const std::vector<int64_t>& shape) const {
    const TensorView& view = file.at(name);
    if (view.shape != shape)
      safetensors::fail_tensor(
          file.path(), name,
          "shape " + safetensors::shape_text(view.shape) + ", expected " + safetensors::shape_text(shape));
    return stored_values<float>(view, file.path());
  }
};

template <class Device, class T>
Buffer<Device, T> to_device(Device& dev, const Floats& x) {
  std::vector<T> values;
  for (const float value : x) values.push_back(T(value));
  Buffer<Device, T> buffer(dev, values.size(), "an input", "a shorter file");
  dev.upload(buffer.get(), values.data(), buffer.bytes());
  dev.synchronize();
  return buffer;
}

template <class Device, class T>
Floats to_host(Device& dev, const Buffer<Device, T>& buffer) {
  std::vector<T> values(buffer.size());
  dev.download(values.data(), buffer.get(), buffer.bytes());
  return Floats(values.begin(), values.end());
}

// Columns [first, first + width) of rows of `stride`.
Floats columns(const Floats& x, int stride, int first, int width) {
  Floats out;
  for (size_t row = 0; row < x.size(); row += stride)
    out.insert(out.end(), &x[row + first], &x[row + first] + width);
  return out;
}

template <class Device>
void run(Device& dev, const std::string& from, const std::string& to) {
  using act = typename Device::act;
  const Input in{SafetensorsFile(from)};
  const std::vector<int64_t> keys = in.file.at("q").shape, values = in.file.at("v").shape;
  if (keys.size() != 4 || values.size() != 4 || keys[2] < 1 || values[2] % keys[2] != 0)
    safetensors::fail(from, "q " + safetensors::shape_text(keys) + " and v " +
                                safetensors::shape_text(values) +
                                ": expected [B,T,Hk,dk] and [B,T,Hv,dv], Hv a multiple of Hk");
  MixerShape shape;
  shape.batch = int(keys[0]), shape.tokens = int(keys[1]);
  shape.heads_k = int(keys[2]), shape.head_dim_k = int(keys[3]);
  shape.heads_v = int(values[2]), shape.head_dim_v = int(values[3]);
  const std::vector<int64_t> gates{keys[0], keys[1], values[2]};
  const Floats q = in.read("q", keys), k = in.read("k", keys), v = in.read("v", values);
  const int C = shape.conv_channels();
  Floats packed(size_t(shape.rows()) * C);
  for (int m = 0; m < shape.rows(); m++) {
    std::copy_n(&q[size_t(m) * shape.key_dim()], shape.key_dim(), &packed[size_t(m) * C]);
    std::copy_n(&k[size_t(m) * shape.key_dim()], shape.key_dim(), &packed[size_t(m) * C + shape.key_dim()]);
    std::copy_n(&v[size_t(m) * shape.value_dim()], shape.value_dim(),
                &packed[size_t(m) * C + 2 * shape.key_dim()]);
  }
  const auto qkv = to_device<Device, act>(dev, packed),
             d_o = to_device<Device, act>(dev, in.read("do", values));
  const auto g = to_device<Device, float>(dev, in.read("g", gates));
  const auto beta = to_device<Device, float>(dev, in.read("beta", gates));
  const Buffer<Device, act> o(dev, d_o.size(), "o"), dqkv(dev, packed.size(), "dqkv");
  const Buffer<Device, float> dg(dev, g.size(), "dg"), dbeta(dev, g.size(), "dbeta");
  const Buffer<Device, unsigned char> saved(dev, gated_delta_rule_saved_bytes(dev, shape), "states");
  const Buffer<Device, unsigned char> scratch(dev, gated_delta_rule_scratch_bytes(dev, shape), "work space");
  const float s = 1 / std::sqrt(float(shape.head_dim_k));
  gated_delta_rule_forward(dev, o.get(), saved.get(), qkv.get(), g.get(), beta.get(), shape, s,
                           scratch.get());
  gated_delta_rule_backward(dev, dqkv.get(), dg.get(), dbeta.get(), d_o.get(), saved.get(), qkv.get(),
                            g.get(), beta.get(), shape, s, scratch.get());
  dev.synchronize();

  const Floats gradient = to_host(dev, dqkv), out = to_host(dev, o);
  const Floats dq = columns(gradient, C, 0, shape.key_dim());
  const Floats dk = columns(gradient, C, shape.key_dim(), shape.key_dim());
  const Floats dv = columns(gradient, C, 2 * shape.key_dim(), shape.value_dim());
  const Floats d_g = to_host(dev, dg), d_beta = to_host(dev, dbeta);
  write_safetensors(
      to,
      {from_host("o", "F32", values, out.data()), from_host("dq", "F32", keys, dq.data()),
       from_host("dk", "F32", keys, dk.data()), from_host("dv", "F32", values, dv.data()),
       from_host("dg", "F32", gates, d_g.data()), from_host("dbeta", "F32", gates, d_beta.data())},
      {});
}

}  // namespace

int main(int argc, char** argv) {
  const std::string device = argc == 4 ? argv[3] : "";
  if (device != "cuda" && device != "cpu") {
    std::fprintf(stderr, "delta_rule_file: expected INPUT.safetensors OUTPUT.safetensors cuda|cpu\n");
    return 1;
  }
  try {
    if (device == "cpu") {
      Cpu<float> dev;
      run(dev, argv[1], argv[2]);
      return 0;
    }
#ifdef GDN_CUDA
    Cuda dev;
    run(dev, argv[1], argv[2]);
    return 0;
#else
    throw std::runtime_error("cuda: this program was built without nvcc");
#endif
  } catch (const std::exception& e) {
    std::fprintf(stderr, "delta_rule_file: %s\n", e.what());
    return 1;
  }
}
