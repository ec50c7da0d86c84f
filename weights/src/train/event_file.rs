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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, by the reversed Castagnoli polynomial.
    fn crc32c(bytes: &[u8]) -> u32 {
        let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
    }

    /// The data of every record, after its length and checksums are seen to be right.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let masked = |bytes: &[u8]| (crc32c(bytes) >> 15 | crc32c(bytes) << 17).wrapping_add(0xa282_ead8).to_le_bytes();
        let mut records = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            assert_eq!(masked(&file[..8]), file[8..12]);
            let data = &file[12..12 + length];
            assert_eq!(masked(data), file[12 + length..16 + length]);
            records.push(data.to_vec());
            file = &file[16 + length..];
        }
        records
    }

    #[test]
    fn records_as_tensorboard_reads_them() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let folder = std::env::temp_dir().join(format!("event-file-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut events = EventFile::create(&folder).unwrap();
        events.scalars(300, [("loss", 0.5), ("tau", -2.)]).unwrap();
        let records = records(&std::fs::read(&events.path).unwrap());
        // After the time, nine bytes: field 3, a text of 13.
        assert_eq!(records[0][9..], *b"\x1a\x0dbrain.Event:2");
        // Field 2, 300 as a varint; field 5, the summary: two values, each with a tag and four bytes of f32.
        let value = |tag: &[u8], number: f32| {
            let mut entry = vec![0x0a, tag.len() as u8];
            entry.extend(tag);
            entry.push(0x15);
            entry.extend(number.to_le_bytes());
            [vec![0x0a, entry.len() as u8], entry].concat()
        };
        let summary = [value(b"loss", 0.5), value(b"tau", -2.)].concat();
        let expected = [vec![0x10, 0xac, 0x02, 0x2a, summary.len() as u8], summary].concat();
        assert_eq!(records[1][9..], expected[..]);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
