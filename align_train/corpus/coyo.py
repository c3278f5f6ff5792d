"""COYO-700M's metadata: its columns, their types and what they mean.

From https://github.com/kakaobrain/coyo-dataset (README, "Metadata Attributes"); 746,972,269 rows in 128 parquet files.
"""

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # unique
        ("url", pa.string()),
        ("text", pa.string()),  # the alt-text
        ("width", pa.int32()),  # pixels, of the image behind the link
        ("height", pa.int32()),
        ("image_phash", pa.string()),  # perceptual hash, 64 bits as 16 hexadecimal digits
        ("text_length", pa.int32()),  # characters
        ("word_count", pa.int32()),  # runs of letters, digits and underscores: len(re.findall(r"\w+", text))
        ("num_tokens_bert", pa.int32()),  # WordPiece tokens, [CLS] and [SEP] not counted
        ("num_tokens_gpt", pa.int32()),
        ("num_faces", pa.int32()),
        ("clip_similarity_vitb32", pa.float32()),  # cosine of CLIP's embeddings of image and text
        ("clip_similarity_vitl14", pa.float32()),
        ("nsfw_score_opennsfw2", pa.float32()),  # 0 to 1, and so are the next two
        ("nsfw_score_gantman", pa.float32()),
        ("watermark_score", pa.float32()),
        ("aesthetic_score_laion_v2", pa.float32()),  # about 1 to 10
    ]
)
