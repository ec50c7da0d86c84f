//! `host-demo`: the command line.

mod choice;
mod cli;
mod compare;
mod generate;
mod options;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: diffusion::TensorAllocator = diffusion::TensorAllocator::new();

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { host_demo::settle_threads() };
    let cli = cli::Cli::parse();
    // On a thread of the pool, which takes part in parallel work instead of sleeping until it is done.
    match rayon::scope(|_| cli::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
