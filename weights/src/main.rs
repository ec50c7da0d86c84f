//! `weights`: says what a file of weights is, converts between the layouts that users have, and trains.

mod alpha;
mod convert;
mod eval;
mod ground;
mod inspect;
mod judge;
mod probe;
mod score;
mod shapes;
mod summary;
mod training;
mod tune;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use convert::Convert;
use eval::Eval;
use ground::Ground;
use inspect::Inspect;
use probe::Probe;
use score::Score;
use shapes::Shapes;
use tune::Tune;
use weights::Result;

#[global_allocator]
static ALLOCATOR: diffusion::TensorAllocator = diffusion::TensorAllocator::for_training();

/// Looks into files of weights, converts them, and makes them.
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
    /// Draw the shapes world as a folder of training data.
    Shapes(Shapes),
    /// Train an adapter on a frozen model (stage 1).
    Probe(Box<Probe>),
    /// Train adapter and LoRA together (stage 2).
    Tune(Box<Tune>),
    /// Measure what an adapter, and the correction by it, bring.
    #[command(subcommand)]
    Eval(Box<Eval>),
    /// Rank prompts for a picture, or pictures for a prompt.
    Score(Box<Score>),
    /// Find what a phrase speaks of in a picture.
    Ground(Box<Ground>),
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Convert(convert) => convert.run(),
        Command::Shapes(shapes) => shapes.run(),
        Command::Probe(probe) => probe.run(),
        Command::Tune(tune) => tune.run(),
        Command::Eval(eval) => eval.run(),
        Command::Score(score) => score.run(),
        Command::Ground(ground) => ground.run(),
    }
}

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { host_demo::settle_threads() };
    let cli = Cli::parse();
    // On a thread of the pool, which takes part in parallel work instead of sleeping until it is done.
    match rayon::scope(|_| run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
