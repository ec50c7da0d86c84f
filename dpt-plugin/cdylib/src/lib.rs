//! The shared library that hosts load. It exports the sampler-hook entry for C and the abi_stable root module for Rust; both
//! lead to the same table.

/// The library's own, not the host's.
#[global_allocator]
static ALLOCATOR: dpt_plugin::TensorAllocator = dpt_plugin::TensorAllocator::new();

host_api::export_plugins!(dpt_plugin::DptPlugin);
