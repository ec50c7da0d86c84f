//! They need a GPU, or the emulated driver.

use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};

use super::{Pass, Replay, asking};
use crate::layers::finite_difference::{numbers, values};
use crate::{Error, Result};

fn cuda() -> Device {
    crate::device("cuda").unwrap()
}

fn on_cuda(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap().to_device(&cuda()).unwrap()
}

/// Products, sums of broadcast shapes, zeros: what uploads shapes, sets memory, and calls cuBLAS.
fn work([x, by]: [&Tensor; 2], fixed: &Tensor) -> Result<[Tensor; 2]> {
    let y = x.matmul(fixed)?.broadcast_mul(by)?;
    let sum = (y.t()?.contiguous()? + y.zeros_like()?.t()?)?.sum_keepdim(0)?;
    Ok([y.broadcast_add(&sum.t()?)?, sum.max_all()?])
}

fn fixed() -> Tensor {
    on_cuda(&values(9, (5, 6)))
}

fn inputs(seed: u64, rows: usize) -> [Tensor; 2] {
    [on_cuda(&values(seed, (rows, 5))), on_cuda(&values(seed + 100, (rows, 1)))]
}

fn all(tensors: &[Tensor]) -> Vec<Vec<f64>> {
    tensors
        .iter()
        .map(|tensor| numbers(&tensor.to_dtype(DType::F64).unwrap().to_device(&Device::Cpu).unwrap()))
        .collect()
}

#[test]
fn what_is_replayed_is_what_would_be_done() {
    let (mut replay, fixed, mut passes) = (Replay::new(true), fixed(), Vec::new());
    let mut kept = Vec::new();
    for (seed, rows) in [(1, 4), (2, 4), (3, 4), (4, 4), (5, 7), (6, 7), (7, 7), (8, 4)] {
        let inputs = inputs(seed, rows);
        let found = replay.run(inputs.each_ref(), |inputs, pass| {
            passes.push(pass);
            work(inputs, &fixed)
        });
        kept.push((found.unwrap(), work(inputs.each_ref(), &fixed).unwrap()));
    }
    // Results are of their own: later passes left them as they were.
    for (found, expected) in kept {
        assert_eq!(all(&found), all(&expected));
    }
    use Pass::{Captured, Now};
    assert_eq!(passes, [Now, Captured, Now, Captured, Now], "4 rows, then 7, then 4 again");
}

#[test]
fn nothing_is_captured_unasked() {
    let (mut replay, fixed, calls) = (Replay::new(false), fixed(), AtomicUsize::new(0));
    for seed in 0..4 {
        let inputs = inputs(seed, 4);
        let results = replay.run(inputs.each_ref(), |inputs, pass| {
            calls.fetch_add(1, Ordering::Relaxed);
            assert_eq!(pass, Pass::Now);
            work(inputs, &fixed)
        });
        assert_eq!(all(&results.unwrap()), all(&work(inputs.each_ref(), &fixed).unwrap()));
    }
    assert_eq!(calls.into_inner(), 4);
}

/// Numbers that are read back, an upload of others, a tensor from outside that is freed, an error of the work's own: the stream is as
/// before, and the work is done as it is.
#[test]
fn what_cannot_be_captured_is_done_as_it_is() {
    for what in ["reads numbers", "uploads", "frees", "fails"] {
        let (mut replay, mut captures, mut other) = (Replay::new(true), 0, Some(inputs(9, 4)));
        for seed in 0..5u8 {
            let x = inputs(seed.into(), 4)[0].clone();
            let found = replay.run([&x], |[x], pass| {
                captures += usize::from(pass == Pass::Captured);
                let y = x.affine(2., 1.)?;
                match what {
                    "reads numbers" => drop(y.to_vec2::<f32>()?),
                    "uploads" => drop(Tensor::from_vec(vec![seed; 20], 20, y.device())?),
                    "frees" if pass == Pass::Captured => drop(other.take()),
                    "fails" if pass == Pass::Captured => return Err(Error::Input("not now".into())),
                    _ => {}
                }
                Ok([y])
            });
            assert_eq!(all(&found.unwrap()), all(&[x.affine(2., 1.).unwrap()]), "{what}");
        }
        // The second time nothing is left to be freed, and it is captured.
        assert_eq!(captures, 2, "{what}");
    }
}

/// A graph takes its memory as it is launched. Where there is none left, there is none for the work as it is either, and that is the
/// error; later steps go on.
#[test]
fn a_graph_without_memory_is_given_up() {
    let fill = |bytes: usize| Tensor::zeros(bytes, DType::U8, &cuda()).unwrap();
    let free = || candle_core::cuda::cudarc::driver::result::mem_get_info().unwrap().0;
    // Eight results of 16 MB at a time.
    let work = |x: &Tensor| -> Result<[Tensor; 1]> {
        let wide = x.broadcast_as((1 << 22, 1))?;
        let all = (0..8).map(|i| wide.affine(1., f64::from(i))).collect::<candle_core::Result<Vec<_>>>()?;
        Ok([all.iter().try_fold(all[0].zeros_like()?, |sum, x| sum + x)?.narrow(0, 0, 3)?.contiguous()?])
    };
    let mut replay = Replay::new(true);
    let mut step = |seed| {
        let x = on_cuda(&values(seed, 1));
        let mut passes = 0;
        let found = replay.run([&x], |[x], _| {
            passes += 1;
            work(x)
        });
        let found = found.map(|found| assert_eq!(all(&found), all(&work(&x).unwrap()), "{seed}"));
        (found, passes, replay.outcome())
    };
    assert!(matches!(step(0), (Ok(()), 1, None)));
    assert!(matches!(step(1), (Ok(()), 1, Some(Ok(())))));
    assert!(matches!(step(2), (Ok(()), 0, None)));
    // Others take what the graph had.
    crate::device::release_graphs(0);
    let mut hoard = Vec::new();
    while free() > 256 << 20 {
        hoard.push(fill(128 << 20));
    }
    hoard.push(fill(free() - (64 << 20)));
    let (found, passes, outcome) = step(3);
    drop(hoard);
    assert!(found.unwrap_err().is_out_of_memory());
    assert_eq!(passes, 1);
    assert!(outcome.unwrap().unwrap_err().is_out_of_memory());
    assert!(matches!(step(4), (Ok(()), 1, None)));
}

/// While another thread asks for work nothing is captured; it waits while something is.
#[test]
fn threads_that_ask_put_off_captures() {
    let (mut replay, fixed, mut passes) = (Replay::new(true), fixed(), Vec::new());
    let mut step = |seed| {
        let (inputs, mut waiting) = (inputs(seed, 4), None);
        let results = replay.run(inputs.each_ref(), |inputs, pass| {
            passes.push(pass);
            if pass == Pass::Captured {
                let other = waiting.insert(std::thread::spawn(|| {
                    let _asking = asking();
                    all(&[fixed_twice()])
                }));
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert!(!other.is_finished(), "it asked a stream that was being captured");
            }
            work(inputs, &fixed)
        });
        waiting.into_iter().for_each(|other| assert_eq!(other.join().unwrap(), all(&[fixed_twice()])));
        assert_eq!(all(&results.unwrap()), all(&work(inputs.each_ref(), &fixed).unwrap()));
    };
    step(0);
    std::thread::scope(|scope| {
        let (begun, wait) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let _asking = asking();
            begun.send(()).unwrap();
            ended.recv().unwrap();
        });
        wait.recv().unwrap();
        step(1);
        end.send(()).unwrap();
    });
    step(2);
    step(3);
    assert_eq!(passes, [Pass::Now, Pass::Now, Pass::Captured]);
}

fn fixed_twice() -> Tensor {
    let fixed = fixed();
    (&fixed + &fixed).unwrap()
}
