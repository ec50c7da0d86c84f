//! `weights`: says what a file of weights is, and converts between the layouts that users have.

mod alpha;
mod convert;
mod error;
mod inspect;
mod summary;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use convert::Convert;
use error::Result;
use inspect::Inspect;

/// Looks into files of weights and converts them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what a file or folder of weights is.
    Inspect(Inspect),
    /// Write a file of weights in another layout.
    Convert(Convert),
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Convert(convert) => convert.run(),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
