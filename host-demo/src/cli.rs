//! The command line; each command is a file of its own.

use clap::{Parser, Subcommand};
use host_demo::Result;
use indicatif::MultiProgress;

use crate::compare::Compare;
use crate::generate::Generate;

/// Generates images with Stable Diffusion through a sampler-hook plugin.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a picture from a prompt, corrected at every step by the plugin.
    Generate(Generate),
    /// Draw the same seeds without the plugin, with its LoRA, and corrected at several strengths, side by side.
    Compare(Compare),
}

/// Runs the command.
pub fn run(cli: Cli) -> Result<()> {
    let logger = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).build();
    let bars = MultiProgress::new();
    let level = logger.filter();
    if indicatif_log_bridge::LogWrapper::new(bars.clone(), logger).try_init().is_ok() {
        log::set_max_level(level);
    }
    match cli.command {
        Command::Generate(generate) => generate.run(&bars),
        Command::Compare(compare) => compare.run(&bars),
    }
}
