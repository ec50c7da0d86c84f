/// The process's peak resident memory in bytes, where the system tells it (Linux).
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_grows_with_use() {
        let before = super::peak_bytes().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(std::hint::black_box(&block).iter().map(|b| u64::from(*b)).sum::<u64>() == 64 << 20);
        assert!(super::peak_bytes().unwrap() >= before.max(64 << 20));
    }
}
