//! A look at a pickle before candle runs it. Its interpreter copies objects out of and into a memo, nests them as deep as the
//! file says, and makes room for strings before it reads them: here the same opcodes are counted, not carried out.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// No pickle of tensors that PyTorch writes is larger: it holds names and shapes, not numbers.
const MOST_BYTES: u64 = 64 << 20;
/// Objects that may be made by copying; a checkpoint of two thousand tensors makes about ten thousand.
const MOST_COPIES: u64 = 2_000_000;
/// Objects within objects; a tensor in a state dict takes about eight.
const DEEPEST: u32 = 64;

/// Looks through every pickle of the zip archive at `path`.
pub(super) fn check(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let file_size = file.metadata().map_err(|e| e.to_string())?.len();
    let mut archive = zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(|e| e.to_string())?;
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).map_err(|e| e.to_string())?;
        let name = member.name().map_err(|e| e.to_string())?.into_owned();
        if member.size() > file_size {
            return Err(format!("member `{name}` says that it has {} bytes, in a file of {file_size}", member.size()));
        }
        if name.ends_with("data.pkl") {
            let mut pickle = Vec::new();
            member.by_ref().take(MOST_BYTES + 1).read_to_end(&mut pickle).map_err(|e| e.to_string())?;
            if pickle.len() as u64 > MOST_BYTES {
                return Err(format!("a pickle of more than {MOST_BYTES} bytes"));
            }
            Scan::new(&pickle).run()?;
        }
    }
    Ok(())
}

/// What an object weighs in objects, and how deep it goes.
#[derive(Clone, Copy)]
struct Size {
    weight: u64,
    depth: u32,
}

const ONE: Size = Size { weight: 1, depth: 1 };

/// The opcodes of one pickle, counted.
struct Scan<'a> {
    rest: &'a [u8],
    /// `None` is a mark.
    stack: Vec<Option<Size>>,
    memo: HashMap<u32, Size>,
    copies: u64,
}

impl<'a> Scan<'a> {
    fn new(pickle: &'a [u8]) -> Self {
        Self { rest: pickle, stack: Vec::new(), memo: HashMap::new(), copies: 0 }
    }

    fn run(&mut self) -> Result<(), String> {
        loop {
            let opcode = self.take(1)?[0];
            match opcode {
                b'.' => return Ok(()),
                0x80 => drop(self.take(1)?),
                b'c' => {
                    self.line()?;
                    self.line()?;
                    self.push(ONE)?;
                }
                b'K' => self.skip_and_push(1)?,
                b'M' => self.skip_and_push(2)?,
                b'J' => self.skip_and_push(4)?,
                b'G' => self.skip_and_push(8)?,
                0x8a => {
                    let length = self.take(1)?[0];
                    self.skip_and_push(length.into())?;
                }
                b'X' => {
                    let length = self.number(4)?;
                    self.take(length as usize)?;
                    self.push(Size { weight: 1 + u64::from(length) / 64, depth: 1 })?;
                }
                b')' | b'N' | b'}' | b'd' | b']' | 0x88 | 0x89 => self.push(ONE)?,
                b'(' => self.stack.push(None),
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(items)?;
                }
                b'Q' | 0x85 => self.wrap(1)?,
                0x86 | b'R' | b'b' | 0x81 => self.wrap(2)?,
                0x87 => self.wrap(3)?,
                b'a' => {
                    let value = self.pop()?;
                    self.add(value)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.add(value)?;
                    self.add(key)?;
                }
                b'e' | b'u' => {
                    let items = self.pop_to_mark()?;
                    self.add(items)?;
                }
                b'q' | b'r' => {
                    let id = self.number(if opcode == b'q' { 1 } else { 4 })?;
                    let last = self.last()?;
                    self.copy(last)?;
                    self.memo.insert(id, last);
                }
                b'h' | b'j' => {
                    let id = self.number(if opcode == b'h' { 1 } else { 4 })?;
                    let object = *self.memo.get(&id).ok_or_else(|| format!("nothing was remembered as {id}"))?;
                    self.copy(object)?;
                    self.push(object)?;
                }
                other => return Err(format!("opcode {other:#04x}, which no file of tensors has")),
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("the pickle ends early")?;
        self.rest = rest;
        Ok(taken)
    }

    /// Little-endian, of at most four bytes.
    fn number(&mut self, bytes: usize) -> Result<u32, String> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn line(&mut self) -> Result<(), String> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').ok_or("the pickle ends early")?;
        self.take(end + 1).map(drop)
    }

    fn skip_and_push(&mut self, count: usize) -> Result<(), String> {
        self.take(count)?;
        self.push(ONE)
    }

    fn push(&mut self, size: Size) -> Result<(), String> {
        if size.depth > DEEPEST {
            return Err(format!("objects nested more than {DEEPEST} deep"));
        }
        self.stack.push(Some(size));
        Ok(())
    }

    fn pop(&mut self) -> Result<Size, String> {
        self.stack.pop().flatten().ok_or_else(|| "an object is taken where there is none".into())
    }

    fn last(&self) -> Result<Size, String> {
        self.stack.last().copied().flatten().ok_or_else(|| "an object is looked at where there is none".into())
    }

    /// The sizes above the last mark, as one object that holds them.
    fn pop_to_mark(&mut self) -> Result<Size, String> {
        let mut all = ONE;
        loop {
            match self.stack.pop() {
                None => return Err("a mark is looked for where there is none".into()),
                Some(None) => return Ok(all),
                Some(Some(size)) => all = within(all, size),
            }
        }
    }

    /// The last `count` objects inside one.
    fn wrap(&mut self, count: usize) -> Result<(), String> {
        let mut all = ONE;
        for _ in 0..count {
            all = within(all, self.pop()?);
        }
        self.push(all)
    }

    /// Puts an object into the last one.
    fn add(&mut self, size: Size) -> Result<(), String> {
        let container = self.pop()?;
        self.push(within(container, size))
    }

    fn copy(&mut self, size: Size) -> Result<(), String> {
        self.copies = self.copies.saturating_add(size.weight);
        match self.copies > MOST_COPIES {
            true => Err(format!("more than {MOST_COPIES} objects would be copied")),
            false => Ok(()),
        }
    }
}

fn within(outer: Size, inner: Size) -> Size {
    Size { weight: outer.weight.saturating_add(inner.weight), depth: outer.depth.max(inner.depth + 1) }
}
