//! The shared library that hosts load. It exports the sampler-hook entry for C and the abi_stable root module for Rust; both
//! lead to the same table.

host_api::export_plugins!(dpt_plugin::DptPlugin);
