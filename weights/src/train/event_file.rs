use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// A file of scalars that TensorBoard reads: TFRecords of `tensorflow.Event` messages.
pub struct EventFile {
    file: File,
    path: std::path::PathBuf,
}

impl EventFile {
    /// A new file in `folder`, with the name that TensorBoard looks for.
    pub fn create(folder: &Path) -> Result<Self> {
        let name = format!("events.out.tfevents.{:.0}.weights.{}", seconds(), std::process::id());
        let path = folder.join(name);
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::file(&path, e))?;
        let mut events = Self { file, path };
        // Field 3, file_version.
        let version = b"brain.Event:2";
        let mut event = Vec::new();
        event.extend([0x1a, version.len() as u8]);
        event.extend(version);
        events.write(event)?;
        Ok(events)
    }

    /// The values of a step, by tag.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            // Summary.Value: field 1, tag; field 2, simple_value.
            let mut entry = Vec::new();
            message(&mut entry, 1, tag.as_bytes());
            entry.push(0x15);
            entry.extend((value as f32).to_le_bytes());
            message(&mut summary, 1, &entry);
        }
        // Field 2, step; field 5, summary.
        let mut event = vec![0x10];
        varint(&mut event, step);
        message(&mut event, 5, &summary);
        self.write(event)
    }

    /// Field 1, wall_time, before the rest; as a record of length, its checksum, data and theirs.
    fn write(&mut self, rest: Vec<u8>) -> Result<()> {
        let mut event = vec![0x09];
        event.extend(seconds().to_le_bytes());
        event.extend(rest);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_checksum(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_checksum(&event).to_le_bytes());
        self.file.write_all(&record).map_err(|e| Error::file(&self.path, e))
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}

/// A length-delimited field of a protocol buffer.
fn message(out: &mut Vec<u8>, field: u8, content: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend(content);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// CRC-32C, rotated and shifted as TFRecords have it.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}
