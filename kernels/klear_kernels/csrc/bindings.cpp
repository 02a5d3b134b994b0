// klear_kernels._cuda: the row pass and the products on torch tensors. The only file that knows torch.

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/extension.h>

#include "products.h"
#include "row_pass.h"

namespace {

using torch::Tensor;

void check(const Tensor& tensor, const char* name, at::ScalarType type, int64_t dimensions, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.is_cuda() && tensor.device() == like.device(), name, ": got device ", tensor.device(),
                    ", the others are on ", like.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == type, name, ": got ", tensor.scalar_type(), ", allowed ", type);
  TORCH_CHECK_VALUE(tensor.dim() == dimensions && tensor.is_contiguous(), name, ": got shape ", tensor.sizes(),
                    ", allowed ", dimensions, " contiguous dimension(s)");
}

void done(const char* what, const char* error) { TORCH_CHECK(error == nullptr, "klear_kernels._cuda.", what, ": ", error); }

klear::HeadShape shape_of(const Tensor& rows, int64_t words, int64_t hidden_size) {
  TORCH_CHECK_VALUE(words >= 1 && words <= rows.size(1), "words: got ", words, ", rows hold ", rows.size(1));
  return {int(rows.size(0)), int(hidden_size), int(words), rows.size(1)};
}

void logits_product(const Tensor& rows, const Tensor& hidden, const Tensor& weight, double scale) {
  check(rows, "rows", at::kFloat, 2, rows);
  check(hidden, "hidden", at::kBFloat16, 2, rows);
  check(weight, "weight", at::kBFloat16, 2, rows);
  TORCH_CHECK_VALUE(hidden.size(0) == rows.size(0) && hidden.size(1) == weight.size(1), "hidden: got shape ",
                    hidden.sizes(), ", rows are ", rows.sizes(), ", weight is ", weight.sizes());
  const c10::cuda::CUDAGuard guard(rows.device());
  done("logits_product",
       klear::logits_product(at::cuda::getCurrentCUDABlasHandle(), shape_of(rows, weight.size(0), weight.size(1)),
                             hidden.data_ptr(), weight.data_ptr(), float(scale), rows.data_ptr<float>()));
}

std::tuple<Tensor, Tensor, Tensor> row_pass(const Tensor& rows, int64_t words, const Tensor& labels, bool write) {
  check(rows, "rows", at::kFloat, 2, rows);
  check(labels, "labels", at::kLong, 1, rows);
  const auto shape = shape_of(rows, words, 0);
  TORCH_CHECK_VALUE(labels.size(0) == rows.size(0), "labels: got ", labels.size(0), ", rows are ", rows.size(0));
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto row_max = at::empty({shape.tokens}, rows.options());
  const auto label_gap = at::empty({shape.tokens}, rows.options());
  const auto partials = at::empty({shape.tokens, klear::row_pass_blocks(shape.words), klear::kPartials}, rows.options());
  const klear::RowPass pass{rows.data_ptr(),           shape.stride,
                            shape.tokens,              shape.words,
                            labels.data_ptr<int64_t>(), row_max.data_ptr<float>(),
                            label_gap.data_ptr<float>(), partials.data_ptr<float>(),
                            write};
  done("row_pass", klear::launch_row_pass(pass, at::cuda::getCurrentCUDAStream().stream()));
  return {row_max, label_gap, partials};
}

Tensor hidden_product(const Tensor& rows, const Tensor& weight) {
  check(rows, "rows", at::kFloat, 2, rows);
  check(weight, "weight", at::kBFloat16, 2, rows);
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto out = at::empty({rows.size(0), weight.size(1)}, rows.options());
  done("hidden_product",
       klear::hidden_product(at::cuda::getCurrentCUDABlasHandle(), shape_of(rows, weight.size(0), weight.size(1)),
                             rows.data_ptr(), weight.data_ptr(), out.data_ptr<float>()));
  return out;
}

void add_weight_product(const Tensor& gradient, const Tensor& rows, const Tensor& scaled_hidden) {
  check(rows, "rows", at::kFloat, 2, rows);
  check(gradient, "gradient", at::kFloat, 2, rows);
  check(scaled_hidden, "scaled_hidden", at::kBFloat16, 2, rows);
  TORCH_CHECK_VALUE(scaled_hidden.size(0) == rows.size(0) && scaled_hidden.size(1) == gradient.size(1),
                    "scaled_hidden: got shape ", scaled_hidden.sizes(), ", rows are ", rows.sizes(), ", gradient is ",
                    gradient.sizes());
  const c10::cuda::CUDAGuard guard(rows.device());
  done("add_weight_product",
       klear::add_weight_product(at::cuda::getCurrentCUDABlasHandle(),
                                 shape_of(rows, gradient.size(0), gradient.size(1)), rows.data_ptr(),
                                 scaled_hidden.data_ptr(), gradient.data_ptr<float>()));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("max_words") = klear::kMaxWords;
  module.def("logits_product", &logits_product, "rows = scale * hidden @ weight.T");
  module.def("row_pass", &row_pass, "row maxima, label gaps and partial sums; with write, exponentials in place");
  module.def("hidden_product", &hidden_product, "exponentials @ weight");
  module.def("add_weight_product", &add_weight_product, "gradient += exponentials.T @ scaled_hidden");
}
