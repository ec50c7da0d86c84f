//! `host-demo`: the command line.

mod choice;
mod cli;
mod compare;
mod generate;
mod options;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { host_demo::settle_threads() };
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
