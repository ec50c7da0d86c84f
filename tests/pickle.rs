//! PyTorch checkpoints written by hand: the zip container, and the opcodes of a pickle.

/// A zip file whose members are stored as they are.
pub fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let mut fields = Vec::new();
        // Version 2.0, no flags, stored, no time; then checksum, both sizes, and the name's length.
        fields.extend([20u16, 0, 0, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
        fields.extend([crc32(data), data.len() as u32, data.len() as u32].iter().flat_map(|v| v.to_le_bytes()));
        fields.extend([name.len() as u16, 0].iter().flat_map(|v| v.to_le_bytes()));
        directory.extend(*b"PK\x01\x02\x14\x00");
        directory.extend(&fields);
        // No comment, first disk, no attributes; then where the member is.
        directory.extend([0; 10]);
        directory.extend((file.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend(*b"PK\x03\x04");
        file.extend(&fields);
        file.extend(name.as_bytes());
        file.extend(*data);
    }
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(*b"PK\x05\x06\0\0\0\0");
    file.extend([members.len() as u16; 2].iter().flat_map(|v| v.to_le_bytes()));
    file.extend([directory.len() as u32, start].iter().flat_map(|v| v.to_le_bytes()));
    file.extend([0; 2]);
    file
}

/// The checksum of zip.
pub fn crc32(data: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A file as `torch.save` makes it: the pickle, and one storage.
pub fn checkpoint(pickle: &[u8], storage: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = storage.iter().flat_map(|v| v.to_le_bytes()).collect();
    zip(&[("archive/data.pkl", pickle), ("archive/data/0", &bytes), ("archive/version", b"3\n")])
}

/// A pickle of protocol 2 that holds `body`.
pub fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}

/// A string.
pub fn text(value: &str) -> Vec<u8> {
    [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
}

/// A number.
pub fn int(value: i32) -> Vec<u8> {
    [b"J", &value.to_le_bytes()[..]].concat()
}

/// A tuple.
pub fn tuple(values: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &values.concat()[..], b"t"].concat()
}

/// `module.name(*arguments)`.
pub fn call(module: &str, name: &str, arguments: &[Vec<u8>]) -> Vec<u8> {
    [format!("c{module}\n{name}\n").as_bytes(), &tuple(arguments), b"R"].concat()
}

/// A dictionary.
pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"}(", &entries[..], b"u"].concat()
}

/// A tensor of f32 over storage 0, which is said to have `stored` numbers.
pub fn tensor(shape: &[i32], strides: &[i32], offset: i32, stored: i32) -> Vec<u8> {
    let ints = |values: &[i32]| tuple(&values.iter().map(|v| int(*v)).collect::<Vec<_>>());
    let class = b"ctorch\nFloatStorage\n".to_vec();
    let storage = [tuple(&[text("storage"), class, text("0"), text("cpu"), int(stored)]), b"Q".to_vec()].concat();
    let hooks = call("collections", "OrderedDict", &[]);
    let arguments = [storage, int(offset), ints(shape), ints(strides), b"\x89".to_vec(), hooks];
    call("torch._utils", "_rebuild_tensor_v2", &arguments)
}
