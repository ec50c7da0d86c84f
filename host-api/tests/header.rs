//! The header alone, as every standard of C and C++ that its users may be on, and beside DLPack's own header.

mod common;

use common::{compile, scratch};

const STANDARDS: [(&str, &str); 9] = [
    ("cc", "c99"),
    ("cc", "c11"),
    ("cc", "c17"),
    ("cc", "gnu17"),
    ("c++", "c++11"),
    ("c++", "c++14"),
    ("c++", "c++17"),
    ("c++", "c++20"),
    ("c++", "gnu++20"),
];

/// What dlpack.h declares of what the header uses, as version 1.1 does it: typedefs of nameless structs and an enum.
const DLPACK: &str = "
    #ifndef DLPACK_DLPACK_H_
    #define DLPACK_DLPACK_H_
    #include <stdint.h>
    #ifdef __cplusplus
    typedef enum : int32_t { kDLCPU = 1, kDLCUDA = 2 } DLDeviceType;
    #else
    typedef enum { kDLCPU = 1, kDLCUDA = 2 } DLDeviceType;
    #endif
    typedef enum { kDLInt = 0U, kDLUInt = 1U, kDLFloat = 2U, kDLBfloat = 4U } DLDataTypeCode;
    typedef struct { DLDeviceType device_type; int32_t device_id; } DLDevice;
    typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;
    typedef struct {
      void *data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t *shape; int64_t *strides; uint64_t byte_offset;
    } DLTensor;
    #endif
";

/// Compiles `source` as every standard without warnings.
fn compiles(name: &str, source: &str) {
    let folder = scratch(name);
    for (compiler, standard) in STANDARDS {
        let file = folder.join(if compiler == "cc" { "header.c" } else { "header.cpp" });
        std::fs::write(&file, source).unwrap();
        let standard = format!("-std={standard}");
        let strict =
            [&standard, "-Wall", "-Wextra", "-Wundef", "-Wconversion", "-Werror", "-pedantic", "-fsyntax-only"];
        compile(compiler, &strict, &[&file]).unwrap_or_else(|error| panic!("{compiler} {standard}: {error}"));
    }
}

#[test]
fn the_header_needs_no_other_and_may_come_twice() {
    let twice = "#include \"sampler_hook.h\"\n#include \"sampler_hook.h\"\n";
    compiles("header_alone", &format!("{twice}int main(void) {{ return sizeof(sh_entry) == 0; }}\n"));
}

/// A negative array size is how C99 and C++ alike refuse.
fn sizes(view: &str, tensor: &str) -> String {
    format!(
        "typedef char view_is[sizeof(sh_view) == {view} ? 1 : -1], tensor_is[sizeof(sh_tensor) == {tensor} ? 1 : -1];"
    )
}

#[test]
fn the_header_goes_with_dlpacks_in_either_order() {
    let use_both = "sh_view view_of(const DLTensor *tensor);
        sh_view view_of(const DLTensor *tensor) {
          sh_view view = {sizeof(sh_view), 0, {NULL, {SH_DEVICE_CPU, 0}, 0, {SH_DTYPE_FLOAT, 32, 1}, NULL, NULL, 0}, NULL};
          memcpy(&view.tensor, tensor, sizeof(*tensor));
          return view;
        }
        typedef char same_size[sizeof(DLTensor) == sizeof(sh_tensor) ? 1 : -1];
        typedef char same_place[offsetof(DLTensor, byte_offset) == offsetof(sh_tensor, byte_offset) ? 1 : -1];";
    let [view, tensor] =
        [size_of::<host_api::abi::sh_view>(), size_of::<host_api::abi::sh_tensor>()].map(|size| size.to_string());
    let (ours, sizes) = ("#include \"sampler_hook.h\"", sizes(&view, &tensor));
    for (name, first, second) in [("header_dlpack", DLPACK, ours), ("header_before_dlpack", ours, DLPACK)] {
        compiles(name, &format!("#include <string.h>\n{first}\n{second}\n{sizes}\n{use_both}\n"));
    }
}

#[test]
fn other_sizes_are_noticed() {
    let file = scratch("header_wrong").join("header.c");
    std::fs::write(&file, format!("#include \"sampler_hook.h\"\n{}\n", sizes("65", "48"))).unwrap();
    let error = compile("cc", &["-std=c11", "-fsyntax-only"], &[&file]).unwrap_err();
    assert!(error.contains("view_is"), "{error}");
}
